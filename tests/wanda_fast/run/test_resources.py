"""Batch size and placement by free memory: with figures of a machine that is not this one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.every_architecture import tiny_config
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import errors, memory
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.offload import Offload
from wanda_fast.model.recorder import record_block_inputs
from wanda_fast.output import streamed as output
from wanda_fast.pruning.methods import make_method
from wanda_fast.pruning.patterns import parse_pattern
from wanda_fast.report.contents import Report
from wanda_fast.run import resources
from wanda_fast.run.job import Job
from wanda_fast.run.memory_model import footprint
from wanda_fast.run.sweep_memory import sweep_footprint
from wanda_fast.timer import Clock

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
NSAMPLES, SEQLEN, HIDDEN, WIDEST = 12, 100, 64, 160
ACTIVATIONS = NSAMPLES * SEQLEN * HIDDEN * 4
SEQUENCE = SEQLEN * ((3 * WIDEST + 5 * HIDDEN) * 4 + 2 * 4 * HIDDEN)  # a forward's, by the formula


def a_job(method, ids, sequential="block"):
    return Job(
        make_method(method, connect_gate="activated"),
        parse_pattern("2:4", None, False),
        ids,
        evaluation=None,
        clock=Clock(CPU),
        report=Report({}),
        progress=None,
        masks=None,
        sequential=sequential,
    )


@pytest.fixture
def choose(monkeypatch):
    """What is chosen on `device` for a live tiny Llama in float32, with these bytes free."""

    def choose(device=CPU, host=2**40, gpu=0, method="wanda", sequential="block", **asked):
        model = FAMILIES["llama2"]()
        job = a_job(method, token_ids(model, NSAMPLES, SEQLEN), sequential)
        free = {"cpu": host, "cuda": gpu}
        monkeypatch.setattr(
            resources, "free_memory", lambda device: int(free[device.type] / resources.SHARE) + 1
        )
        return resources.choose_resources(job, model, find_blocks(model), device, None, **asked)

    return choose


def test_a_full_batch_where_there_is_room(choose, monkeypatch):
    assert choose().batch_size == NSAMPLES and choose().activations == "host"
    monkeypatch.setitem(resources.TOKENS_PER_BATCH, "cpu", 5 * SEQLEN + 7)
    assert choose().batch_size == 5
    monkeypatch.setitem(resources.TOKENS_PER_BATCH, "cpu", SEQLEN // 2)
    assert choose().batch_size == 1
    assert choose(batch_size=9).batch_size == 9


def test_little_memory_on_a_cpu(choose):
    """First the activations go, then the batch is halved; in the end it is one sequence."""
    statistics = 7 * 64 * 4 + (WIDEST - 64) * 4
    room = ACTIVATIONS + statistics + NSAMPLES * SEQUENCE
    assert choose(host=room).activations == "host"
    assert choose(host=room).predicted == {"host": room}
    chosen = choose(host=room - 1)
    assert (chosen.activations, chosen.batch_size) == ("disk", NSAMPLES)
    chosen = choose(host=statistics + NSAMPLES * SEQUENCE - 1)
    assert (chosen.activations, chosen.batch_size) == ("disk", NSAMPLES // 2)
    assert choose(host=statistics + 2 * SEQUENCE).batch_size == 2
    assert choose(host=0).batch_size == 1 and "more than 80%" in choose(host=0).why
    assert choose(host=0, batch_size=9).batch_size == 9
    assert choose(host=room - 1, activations="host").batch_size == NSAMPLES // 2


def test_on_a_gpu(choose):
    statistics = 7 * 64 * 4 + (WIDEST - 64) * 4
    room = ACTIVATIONS + statistics + NSAMPLES * SEQUENCE
    assert choose(GPU, gpu=room).activations == "device"
    assert choose(GPU, gpu=room - 1).activations == "host"
    assert choose(GPU, gpu=room - 1, host=ACTIVATIONS).predicted == {
        "host": ACTIVATIONS,
        "cuda:0": room - ACTIVATIONS,
    }
    assert choose(GPU, gpu=room - 1, host=ACTIVATIONS - 1).activations == "disk"
    assert choose(GPU, gpu=room - ACTIVATIONS - 1, host=ACTIVATIONS).batch_size == NSAMPLES // 2


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_hidden_states_that_are_wider_than_the_model_count_so(kept):
    """Mamba's residual stream is float32 in a 16-bit model, unless its configuration says otherwise."""
    config = tiny_config("mamba")
    config.residual_in_fp32 = kept == torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, blocks = token_ids(model, NSAMPLES, SEQLEN), find_blocks(model)
    inputs = record_block_inputs(
        lambda batch: model.base_model(batch, use_cache=False), blocks, ids, NSAMPLES, Offload("host", CPU)
    )
    assert inputs.hidden.dtype == kept
    assert footprint(a_job("wanda", ids), model, blocks, None, 1).activations == inputs.hidden.nbytes


def test_connect_and_linear_take_more(choose):
    plain = choose(batch_size=1)
    connect = choose(method="connect", batch_size=1)
    assert connect.parts["statistics"] - plain.parts["statistics"] == 4 * (WIDEST * 64 - 64)
    sparsegpt = choose(method="sparsegpt", batch_size=1)
    squares = 6 * 64**2 + WIDEST**2  # and their factors, and one matrix more while the last is factored
    assert plain.parts["hessians"] == 0 and sparsegpt.parts["hessians"] == 4 * (2 * squares + 64**2)
    linear = choose(sequential="linear", batch_size=1)
    assert linear.parts["forward"] == NSAMPLES * plain.parts["forward"] == NSAMPLES * SEQUENCE


def test_experts_take_more_for_each_expert_of_a_token():
    model = FAMILIES["mixtral"]()  # two of four experts, hidden 64, inner 160
    ids, blocks = token_ids(model, NSAMPLES, SEQLEN), find_blocks(model)
    parts = footprint(a_job("wanda", ids), model, blocks, None, 1)
    experts = 2 * (4 * (64 + 2 * 160 + 160 + 64) + 2 * 4 * 64)
    for block in blocks:
        block.experts = []
    assert parts.forward - footprint(a_job("wanda", ids), model, blocks, None, 1).forward == SEQLEN * experts


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(version, tmp_path):
    """The tightest group around the process, less what is in use, but for pages that can be dropped."""
    top = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage, droppable = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    for group, most in (("a", 1000), ("a/b", 3000)):
        (top / group).mkdir(parents=True)
        (top / group / limit).write_text(f"{most}\n")
        (top / group / usage).write_text("400\n")
        (top / group / "memory.stat").write_text(f"anon 1\n{droppable} 50\n")
    if version == 2:
        (top / "a" / "b" / limit).write_text("max\n")
    membership = tmp_path / "cgroup"
    membership.write_text("7:cpu,cpuacct:/x\n" + ("4:memory:/a/b\n" if version == 1 else "0::/a/b\n"))
    assert min(memory._left_in_cgroups(membership, tmp_path)) == 650
    assert memory._left_in_cgroups(tmp_path / "none", tmp_path) == []


def test_free_memory_is_the_least_of_the_machines_and_the_groups(monkeypatch):
    """With figures of its own: another process may take memory between two readings."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=700, free=100, total=900))
    for groups, least in (([], 700), ([800, 650], 650), ([800], 700)):
        monkeypatch.setattr(memory, "_left_in_cgroups", lambda _, groups=groups: groups)
        assert memory.free_memory(CPU) == least


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama2"]().bfloat16(), folder, pydoc_text[:20000])
    return folder


def test_a_resumed_run_keeps_its_batch_size(llama, tmp_path, monkeypatch):
    """Other free memory, and other figures of how much is fast, change nothing of it."""
    options = dict(dataset=token_ids(FAMILIES["llama2"](), 6, 24), device="cpu", seqlen=24)
    monkeypatch.setitem(resources.TOKENS_PER_BATCH, "cpu", 3 * 24)
    whole = wanda_fast.prune(str(llama), save_model=tmp_path / "whole", **options)
    assert whole.resources["batch_size"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(output.StreamedOutput, "reached", stop)
        with pytest.raises(errors.InterruptedRunError):
            wanda_fast.prune(str(llama), save_model=tmp_path / "out", **options)
    monkeypatch.setattr(resources, "free_memory", lambda _: 0)
    assert wanda_fast.prune(FAMILIES["llama2"](), **options).resources["batch_size"] == 1
    report = wanda_fast.prune(str(llama), save_model=tmp_path / "out", resume=True, **options)
    assert report.resources["batch_size"] == 3 and report.resources["activations"] == "disk"
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(tensors[name], other) for name, other in expected.items())


def stop(self, index, activations):
    self.writer.submit(self.activation_cache.begin(index, activations))
    raise errors.InterruptedRunError("stopped")


@pytest.mark.parametrize("sequential, sets", [("dense", 1), ("block", 4)])
def test_the_settings_of_a_sweep_add_up(sequential, sets):
    """Two of wanda, two of sparsegpt, one of magnitude, which has no calibration."""
    model = FAMILIES["llama2"]()
    ids, blocks = token_ids(model, NSAMPLES, SEQLEN), find_blocks(model)
    kinds = ("wanda", "wanda", "sparsegpt", "sparsegpt", "magnitude")
    jobs = [a_job(method, ids, sequential) for method in kinds]
    windows = EvaluationSet(token_ids(model, 3, SEQLEN), "text")
    shared = replace(jobs[0], evaluation=windows)
    parts = sweep_footprint(jobs, shared, model, blocks, None, 2)
    single = {method: footprint(a_job(method, ids, sequential), model, blocks, None, 2) for method in kinds}
    window_bytes = 3 * SEQLEN * HIDDEN * 4
    assert parts.activations == sets * ACTIVATIONS + (1 + 5) * window_bytes
    # Wanda has statistics, sparsegpt has Hessians: what one has is what both have.
    assert parts.statistics == single["wanda"].statistics > 0
    assert parts.hessians == single["sparsegpt"].hessians > 0
    assert parts.dense == sum(linear.weight.nbytes for linear in blocks[0].linears)
    both = sweep_footprint(
        [a_job("wanda", ids, sequential), a_job("connect", ids, sequential)], shared, model, blocks, None, 2
    )
    connect = footprint(a_job("connect", ids, sequential), model, blocks, None, 2).statistics
    added = single["wanda"].statistics if sequential == "dense" else 0
    assert both.statistics == connect + added
    inside = replace(parts, logits=0)
    assert (
        inside.peak(CPU, "host")["host"] == parts.dense + replace(inside, dense=0).peak(CPU, "host")["host"]
    )
