"""Tiny random models, one of each family, built from their configurations: the same weights in every run.

Weights, biases and norms are all drawn, and large enough that the blocks change what flows through them.
"""

from functools import partial

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 320  # a byte-level tokenizer needs 256, its special tokens and a few merges
WINDOW = 8  # sliding attention: far shorter than any sequence of the tests
SPECIAL = ("<s>", "</s>", "<pad>")  # ids 0, 1, 2

SIZES = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(
    max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2
)
TIED = dict(tie_word_embeddings=True)
GQA = SIZES | dict(intermediate_size=160, num_key_value_heads=2)
MHA = GQA | dict(num_key_value_heads=4)
GEMMA = GQA | TIED | dict(head_dim=16, query_pre_attn_scalar=16)
OPT = SIZES | TIED | dict(ffn_dim=160, word_embed_proj_dim=64)
SMOL = GQA | TIED | dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
MOE = GQA | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, original_max_position_embeddings=64)
LLAMA3_ROPE |= dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def _kinds(*kinds):
    return dict(
        num_hidden_layers=len(kinds), layer_types=[f"{k}_attention" for k in kinds], sliding_window=WINDOW
    )


MIXED = _kinds("sliding", "sliding", "full", "sliding")
CONFIGS = {
    "llama2": lambda: hf.LlamaConfig(**MHA),
    "llama3": lambda: hf.LlamaConfig(**GQA, rope_parameters=dict(LLAMA3_ROPE)),
    "smollm": lambda: hf.LlamaConfig(**SMOL),
    "mistral": lambda: hf.MistralConfig(**GQA, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**GQA | TIED),
    "qwen3": lambda: hf.Qwen3Config(**GQA | TIED, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA | _kinds("sliding", "full")),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA | MIXED),
    "olmo3": lambda: hf.Olmo3Config(**GQA | MIXED),
    "opt": lambda: hf.OPTConfig(**OPT),
    "opt_350m": lambda: hf.OPTConfig(**OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=32)),
    "phi": lambda: hf.PhiConfig(**MHA),
    "phi3": lambda: hf.Phi3Config(**GQA),  # q, k, v in one weight; gate and up in one weight
    "glm4": lambda: hf.Glm4Config(**GQA, head_dim=16),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES, intermediate_size=160),
    "mixtral": lambda: hf.MixtralConfig(**GQA, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**MOE),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256,
                                  initializer_range=0.2, bos_token_id=0, eos_token_id=1),
}  # fmt: skip


def build(name, seed=0):
    """The family's tiny model: float32, in eval mode, the same weights whenever name and seed are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if (
                    parameter.ndim == 1
                ):  # norms start at ones or zeros, biases at zeros: an error there would not show
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


FAMILIES = {name: partial(build, name) for name in CONFIGS}
EXPERTS = ("mixtral", "qwen3_moe")  # most of their weights are in three-dimensional parameters
# Families whose weights are all in nn.Linear: those that the published code prunes.
OF_LINEARS = tuple(name for name in FAMILIES if name not in (*EXPERTS, "gpt2"))


def token_ids(model, nsamples, seqlen, seed=0):
    """LongTensor [nsamples, seqlen] of the model's ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), model.config.vocab_size, (nsamples, seqlen), generator=generator)


def save_checkpoint(model, folder, text):
    """Write the model and a byte-level BPE tokenizer trained on text: what from_pretrained loads, offline."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.config.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    bos, eos, pad = SPECIAL
    wrapped = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )
    wrapped.save_pretrained(folder)
    model.save_pretrained(folder)
