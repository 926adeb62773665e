"""What the tensors of a checkpoint are called, and which parameter each becomes a part of."""

from minipyramid.config import ModelConfig

# A parameter's name -> name and shape of each stored tensor that it joins.
Sources = dict[str, list[tuple[str, tuple[int, ...]]]]


def parameter_sources(config: ModelConfig) -> Sources:
    """For each parameter of the model, the stored tensors that it joins, with the shapes they must have."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    in_layer: Sources = {
        "input_layernorm": [("input_layernorm", (hidden,))],
        "qkv_proj.weight": [
            ("self_attn.q_proj", (q, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
        ],
        "o_proj.weight": [("self_attn.o_proj", (hidden, q))],
        "post_attention_layernorm": [("post_attention_layernorm", (hidden,))],
        "gate_up_proj.weight": [("mlp.gate_proj", (ffn, hidden)), ("mlp.up_proj", (ffn, hidden))],
        "down_proj.weight": [("mlp.down_proj", (hidden, ffn))],
    }
    in_layer = {name: [(f"{part}.weight", shape) for part, shape in of] for name, of in in_layer.items()}
    if config.qkv_bias:
        of_each = {"q": q, "k": kv, "v": kv}.items()
        in_layer["qkv_bias"] = [(f"self_attn.{part}_proj.bias", (size,)) for part, size in of_each]
    if config.head_norms:
        in_layer["q_norm"] = [("self_attn.q_norm.weight", (config.head_dim,))]
        in_layer["k_norm"] = [("self_attn.k_norm.weight", (config.head_dim,))]
    sources: Sources = {
        "embed_tokens": [("model.embed_tokens.weight", (vocab, hidden))],
        "norm": [("model.norm.weight", (hidden,))],
        "lm_head.weight": [("lm_head.weight", (vocab, hidden))],
    }
    for i in range(config.num_hidden_layers):
        stored = f"model.layers.{i}"
        for name, parts in in_layer.items():
            sources[f"layers.{i}.{name}"] = [(f"{stored}.{part}", shape) for part, shape in parts]
    return sources
