"""A small chat model for tests: a two-layer Llama with random weights, byte-level tokens and a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, POSITIONS = 64, 2, 4, 2, 128, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, PAD = 2, 0
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_chat_model(folder: Path, seed: int = 0, *, layers: int = LAYERS, endless: bool = False, **config: Any) -> Path:
    """A Hugging Face Llama folder (hidden 64, 512 positions, 259 tokens, tied embeddings) as transformers opens it.
    An `endless` one never finds its end token the likeliest."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_chat_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    body = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "initializer_range": 0.02,
        **config,
    }
    for name, content in (
        ("config.json", body),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    weights = _weights(vocabulary, layers, seed)
    if endless:
        weights["model.embed_tokens.weight"][END] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def tiny_chat_tokenizer() -> Tokenizer:
    """Every byte is a token, after the three special ones."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def tiny_adapter(folder: Path, seed: int = 0, *, rank: int = 4, scale: float = 0.15, layers: int = LAYERS) -> Path:
    """A LoRA of that model in every module, as peft saves it, large enough to change its answers."""
    wide, narrow = HIDDEN, HIDDEN // HEADS * KV_HEADS
    sizes = {
        "self_attn.q_proj": (HIDDEN, wide),
        "self_attn.k_proj": (HIDDEN, narrow),
        "self_attn.v_proj": (HIDDEN, narrow),
        "self_attn.o_proj": (wide, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INNER),
        "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{i}.{name}.lora_{side}.weight": rng.normal(0.0, 1.0, shape).astype(np.float32)
        * (0.15 if side == "A" else scale)
        for i in range(layers)
        for name, (into, out) in sizes.items()
        for side, shape in (("A", (rank, into)), ("B", (out, rank)))
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted(name.partition(".")[2] for name in sizes)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _weights(vocabulary: int, layers: int, seed: int) -> dict[str, np.ndarray]:
    """Large enough that greedy text differs between prompts and does not stand still."""
    wide, narrow = HIDDEN, HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (wide, HIDDEN),
            f"{layer}self_attn.k_proj.weight": (narrow, HIDDEN),
            f"{layer}self_attn.v_proj.weight": (narrow, HIDDEN),
            f"{layer}self_attn.o_proj.weight": (HIDDEN, wide),
            f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}input_layernorm.weight": (HIDDEN,),
            f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    rng = np.random.default_rng(seed)
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0.0, 0.25, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
