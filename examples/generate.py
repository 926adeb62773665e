"""Several prompts at once, each with parameters of its own. `python examples/generate.py`"""

from minipyramid import LLM, SamplingParams

llm = LLM("weights/storyteller")
prompts = ["Once upon a time", "The door was open, and"]
params = [SamplingParams(max_new_tokens=32), SamplingParams(max_new_tokens=24, temperature=0.8, seed=1)]

for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
    print(prompt + completion.text)
    print(f"  {completion.finish_reason}; {completion.kv_bytes} of {completion.kv_bytes_full} bytes held\n")
