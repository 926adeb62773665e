"""Turn by turn on what was kept: a turn costs its own tokens. `python examples/conversation.py`"""

from minipyramid import LLM, Conversation, SamplingParams

llm = LLM("weights/storyteller")
conversation = Conversation()
params = SamplingParams(max_new_tokens=12, stop=".")
turns = [
    "Nora lives in Fenwick and keeps 47 coins in a tin. The river was wide, and the boats were few.",
    "\nQuestion: Where does Nora live? Answer: Nora lives in",
    "\nQuestion: How many coins does Nora keep? Answer: Nora keeps",
]

for turn in turns:
    reply = "".join(llm.stream(turn, params, conversation))
    assert conversation.held
    print(f"{turn.strip()}{reply}")
    print(f"  [{len(conversation.token_ids)} tokens so far, {conversation.held.bytes} bytes held]")
