"""A text as it comes, and what is known of it beforehand. `python examples/stream.py`"""

from minipyramid import LLM, SamplingParams

llm = LLM("weights/storyteller", kv_budget=0.8)
prompt = "The old house stood at the end of the lane. " * 20
params = SamplingParams(max_new_tokens=48, temperature=0.8, top_p=0.95, seed=1)

assert llm.tokenizer
plan = llm.plan([len(llm.tokenizer.encode(prompt))], params.max_new_tokens)
print(f"will hold {plan.kv_bytes} bytes, {plan.kv_share:.1%} of the full cache")

stream = llm.stream(prompt, params)
for piece in stream:
    print(piece, end="", flush=True)
print()
