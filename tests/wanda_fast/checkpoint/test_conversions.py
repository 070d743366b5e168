"""Checkpoints whose tensors transformers renames, merges or transposes are streamed under their own names."""

import weakref

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Chunk, Concatenate

import wanda_fast
from tests.every_architecture import save_tiny
from tests.tiny_models import VOCAB
from wanda_fast import errors
from wanda_fast.checkpoint import conversions
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.meta_model import open_meta_model
from wanda_fast.checkpoint.save import save
from wanda_fast.model.architecture import find_blocks
from wanda_fast.output import streamed as output
from wanda_fast.run import inputs
from wanda_fast.timer import Clock

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
TEXT |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
IMAGES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
IMAGES |= dict(image_size=28, patch_size=14)
SPECIAL = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
CPU = torch.device("cpu")


def gemma3():
    vision = IMAGES | dict(model_type="siglip_vision_model")
    config = hf.Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def llava_mixtral():
    text, vision = hf.MixtralConfig(**TEXT, num_local_experts=4), hf.CLIPVisionConfig(**IMAGES)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision))


def qwen2_vl():
    vision = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=1)
    config = hf.Qwen2VLConfig(text_config=TEXT | ROPE, vision_config=vision, **SPECIAL)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen3_vl_moe():
    vision = dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
    text = TEXT | ROPE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **SPECIAL)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


# Family -> (a name on disk, the name in the model of what it becomes a part of).
EXPERTS = "model.layers.1.mlp.experts"
PARTS = {
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.w3.weight", f"{EXPERTS}.gate_up_proj"),
    "qwen3_moe": (f"{EXPERTS}.2.down_proj.weight", f"{EXPERTS}.down_proj"),
    "olmoe": (f"{EXPERTS}.1.gate_proj.weight", f"{EXPERTS}.gate_up_proj"),
    "deepseek_v2": (f"{EXPERTS}.0.up_proj.weight", f"{EXPERTS}.gate_up_proj"),
    "deepseek_v3": (f"{EXPERTS}.0.up_proj.weight", f"{EXPERTS}.gate_up_proj"),
    "glm4_moe": ("model.layers.1.mlp.gate.e_score_correction_bias",) * 2,  # in fp32
    "ernie4_5_moe": ("model.layers.1.mlp.gate.weight",) * 2,  # in fp32
    "granitemoe": (
        "model.layers.1.block_sparse_moe.input_linear.weight",
        "model.layers.1.block_sparse_moe.experts.gate_up_proj",
    ),
    "gpt_oss": (f"{EXPERTS}.gate_up_proj",) * 2,
    "llama4_text": ("model.layers.1.feed_forward.experts.gate_up_proj",) * 2,
    "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value.weight",) * 2,
    gemma3: (
        "language_model.model.layers.1.mlp.up_proj.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    ),
    llava_mixtral: (
        "language_model.model.layers.1.block_sparse_moe.experts.3.w3.weight",
        "model.language_model.layers.1.mlp.experts.gate_up_proj",
    ),
    qwen2_vl: ("visual.blocks.0.mlp.fc1.weight", "model.visual.blocks.0.mlp.fc1.weight"),
    qwen3_vl_moe: ("model.language_model.layers.1.mlp.experts.gate_up_proj",) * 2,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that saves a family's tiny checkpoint in bfloat16."""

    def folder_of(family):
        folder = tmp_path_factory.mktemp("model")
        if isinstance(family, str):
            save_tiny(family, folder)
            return folder
        torch.manual_seed(0)
        family().bfloat16().save_pretrained(folder)
        return folder

    return folder_of


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit(folder, **changed):
    save_file(tensors_of(folder) | changed, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal_bytes(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), (
            name
        )


def opened(folder, **options):
    meta_model = open_meta_model(str(folder), **options)
    return meta_model, StreamedModel(meta_model, find_blocks(meta_model.model), CPU, Clock(CPU))


def swept(source, converted_back=False):
    """(tensors of the model, tensors as they would be written) of a sweep over blocks and surroundings.

    Args:
        converted_back: none is read again from the checkpoint.
    """
    if converted_back:
        source._prunable = set(source.meta_model.conversion)
    parts = [(source.block(index), source.names[index]) for index in range(len(source.blocks))]
    held, written = {}, {}
    for part, names in [*parts, (source.surroundings(head=True), source.outside)]:
        with part:
            state = source.model.state_dict()
            held |= {key: state[key].clone() for name in names for key in source.meta_model.names[name]}
            stored = source.stored(names).tensors
            assert list(stored) == names
            written |= {name: tensor.clone() for name, tensor in stored.items()}
    source.close()
    return held, written


@pytest.mark.parametrize("family", PARTS, ids=lambda family: getattr(family, "__name__", family))
def test_converted_as_from_pretrained_and_back(family, folder_of):
    folder, (name, key) = folder_of(family), PARTS[family]
    meta_model, source = opened(folder, dtype="bfloat16")
    assert key in meta_model.names[name] and not meta_model.unused
    held, written = swept(source, converted_back=True)
    kind = type(meta_model.model)
    assert_equal_bytes(held, kind.from_pretrained(folder, dtype="bfloat16").state_dict())
    stored = tensors_of(folder)
    for name in source.copied:  # tied weights that are on disk twice
        written.setdefault(name, stored[name])
    assert_equal_bytes(written, {name: t.bfloat16() for name, t in stored.items()})


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe", gemma3])
def test_pruned_under_its_own_names_and_as_in_memory(family, folder_of, tmp_path, monkeypatch):
    folder, ids = folder_of(family), torch.randint(3, 300, (3, 16))
    dense = tensors_of(folder)

    def prune(kind, **options):
        options |= dict(dataset=ids, seqlen=16, eval_dataset=ids, batch_size=2, device="cpu")
        report = wanda_fast.prune(str(folder), save_model=tmp_path / kind, **options)
        return report, tensors_of(tmp_path / kind)

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "open_meta_model", refuse)
        whole, expected = prune("whole", sparsity_type="2:4")
    monkeypatch.setattr(inputs.checkpoints, "load", None)  # nothing is loaded as a whole
    streamed, pruned = prune("streamed", sparsity_type="2:4")
    assert_equal_bytes(pruned, expected)
    for which in ("dense", "pruned"):
        assert streamed.perplexity[which] == pytest.approx(whole.perplexity[which], rel=1e-4)
    assert all(((pruned[name] == dense[name]) | (pruned[name] == 0)).all() for name in dense)
    assert_equal_bytes(prune("dense", prune_method="dense")[1], dense)


def refuse(*_args):
    raise errors.NotStreamableError("the test says so")


def test_dtypes_of_the_file_are_kept(folder_of, tmp_path):
    folder, router = folder_of("mixtral"), "model.layers.0.block_sparse_moe.gate.weight"
    values = torch.randn(4, 64)
    values[0, 0] = -0.0
    edit(folder, **{router: values})
    _, written = swept(opened(folder)[1])
    assert_equal_bytes(written, tensors_of(folder))
    # Experts of several dtypes, some of which bf16 does not hold.
    experts = "model.layers.1.block_sparse_moe.experts"
    wider = {0: torch.randn(96, 64), 1: torch.randn(96, 64).double()}
    edit(folder, **{f"{experts}.{number}.w1.weight": values for number, values in wider.items()})
    _, source = opened(folder)
    source._prunable = set(source.meta_model.conversion)
    with source.block(1):
        parameter = source.model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
        parameter[:, 3] = 0
        written = source.stored(source.names[1]).tensors
    source.close()
    for number in range(4):
        name = f"{experts}.{number}.w1.weight"
        expected = tensors_of(folder)[name]
        expected[3] = 0
        assert_equal_bytes({name: written[name]}, {name: expected})
    updated = source.meta_model.update_dtypes(["model.layers.1.mlp.experts.gate_up_proj", "lm_head.weight"])
    assert list(updated.values()) == [torch.bfloat16, torch.bfloat16]


def test_tensors_on_disk_are_freed_once_they_are_merged(folder_of, monkeypatch):
    _, source = opened(folder_of("mixtral"), dtype="bfloat16")
    read, seen = source._read, {}

    def watched(names):
        tensors = read(names)
        seen.update({name: weakref.ref(tensor.untyped_storage()) for name, tensor in tensors.items()})
        return tensors

    monkeypatch.setattr(source, "_read", watched)
    with source.block(1):  # the last: no other one is read ahead
        alive = {name for name, storage in seen.items() if storage() is not None}
    source.close()
    assert alive and not any("experts" in name for name in alive)


def transpose_experts(folder):
    """Qwen3-VL-MoE's experts are `[E, in, out]` on the hub, `[E, out, in]` where transformers saved them."""
    tensors = tensors_of(folder)
    names = [name for name in tensors if "mlp.experts" in name]
    edit(folder, **{name: tensors[name].mT.contiguous() for name in names})
    return names


def test_transposed_on_disk(folder_of):
    folder = folder_of(qwen3_vl_moe)
    expected, _ = swept(opened(folder, dtype="bfloat16")[1])
    names = transpose_experts(folder)
    held, written = swept(opened(folder, dtype="bfloat16")[1], converted_back=True)
    assert_equal_bytes(held, expected)
    stored = tensors_of(folder)
    assert len(names) == 4
    assert_equal_bytes({name: written[name] for name in names}, {name: stored[name] for name in names})


def test_transposed_experts_in_memory_are_saved_under_their_own_names(folder_of, tmp_path):
    folder, name = folder_of(qwen3_vl_moe), "model.language_model.layers.1.mlp.experts.down_proj"
    transpose_experts(folder)
    loaded = inputs.checkpoints.load(str(folder), "bfloat16")
    loaded.model.get_parameter(name).data[2, 5] = 0
    save(loaded, tmp_path / "out")
    expected = tensors_of(folder)
    expected[name][2, :, 5] = 0
    assert_equal_bytes(tensors_of(tmp_path / "out"), expected)


def test_what_has_no_inverse_is_refused(folder_of, monkeypatch):
    meta_model = open_meta_model(str(folder_of("mixtral")))
    stored = meta_model.files.on_meta(meta_model.conversion)
    made = meta_model.conversion[PARTS["mixtral"][0]]
    made.require_inverse(stored)
    with monkeypatch.context() as patch:  # halves of the input features
        patch.setattr(Concatenate, "reverse_op", property(lambda _: Chunk(dim=2)))
        with pytest.raises(errors.NotStreamableError, match="does not convert .*gate_up_proj back to .*w1"):
            made.require_inverse(stored)
        patch.setattr(Concatenate, "reverse_op", property(lambda _: None))
        with pytest.raises(errors.NotStreamableError, match="cannot convert .*gate_up_proj back to .*w1"):
            made.require_inverse(stored)
    monkeypatch.setattr(conversions, "MOVING", {"MergeModulelist"})
    with pytest.raises(errors.NotStreamableError, match="transformers' Concatenate makes .*gate_up_proj of"):
        made.require_inverse(stored)


@pytest.mark.parametrize("gone", ["w1", "w"])
def test_an_expert_that_is_absent(gone, folder_of):
    folder = folder_of("mixtral")
    expert = f"layers.1.block_sparse_moe.experts.2.{gone}"
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if expert not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.NotStreamableError, match=r"experts\.0\.w1\.weight"):
        open_meta_model(str(folder))


def test_two_names_of_one_weight(folder_of):
    folder = folder_of("mixtral")
    new, old = (f"model.layers.0.{moe}.gate.weight" for moe in ("mlp", "block_sparse_moe"))
    edit(folder, **{new: tensors_of(folder)[old].clone()})
    with pytest.raises(errors.NotStreamableError, match="are one weight, model.layers.0.mlp.gate.weight"):
        open_meta_model(str(folder))


def test_resumed_after_a_block(folder_of, tmp_path, monkeypatch):
    folder, ids = folder_of("mixtral"), torch.randint(3, 300, (3, 16))
    options = dict(dataset=ids, seqlen=16, eval_dataset=ids, batch_size=2, device="cpu", prune_method="wanda")
    wanda_fast.prune(str(folder), save_model=tmp_path / "once", **options)
    write_block = output.StreamedOutput.write_block

    def killed(self, index, *rest):
        write_block(self, index, *rest)
        self.writer.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.StreamedOutput, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            wanda_fast.prune(str(folder), save_model=tmp_path / "twice", **options)
    # Without hidden states, the finished block runs again with its pruned weights.
    assert not list((tmp_path / "twice.partial").glob("boundary*"))
    report = wanda_fast.prune(str(folder), save_model=tmp_path / "twice", resume=True, **options)
    assert_equal_bytes(tensors_of(tmp_path / "twice"), tensors_of(tmp_path / "once"))
    assert report.sparsity > 0.4
