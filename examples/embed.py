"""Inside another program, which keeps its own loop while requests come. `python examples/embed.py`"""

from minipyramid import LLM, Request, SamplingParams

llm = LLM("weights/storyteller", kv_memory="8MiB")
engine = llm.engine
coming = ["Once upon a time", "The river was wide, and", "Nora said that"]
running: dict[object, str] = {}

while coming or running:
    if coming:  # a request a step; they join those that run
        prompt = coming.pop()
        running[engine.add(Request(prompt, SamplingParams(max_new_tokens=20)))] = prompt
    for handle, piece in engine.step():
        if piece is None:
            # What failed has an error, and of its text only a part is there.
            print(handle.error or repr(running[handle] + handle.completion.text))
            del running[handle]

# A request that nobody waits for any more gives its memory back at once.
forgotten = engine.add(Request("A long story begins", SamplingParams(max_new_tokens=500)))
engine.step()
engine.cancel(forgotten)
print(f"in flight: {engine.scheduler.bytes_in_flight} bytes")
