"""A server that speaks to the clients of OpenAI's API: `python -m minipyramid.serve`."""
