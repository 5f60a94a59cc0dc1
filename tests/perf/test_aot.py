"""Ahead-of-time compilation: a plan read by hand, and a small step compiled for four TPUs."""

from __future__ import annotations

import dataclasses
import pprint
import re

import jax
import pytest

from pixellm_jax.cli.main import main
from pixellm_jax.config import MeshConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.perf import aot
from pixellm_jax.perf.hlo import Array, collectives, traffic
from pixellm_jax.perf.sizes import TINY
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.state import Blueprint, make_blueprint

CONFIG = dataclasses.replace(
    TINY, decoder=dataclasses.replace(TINY.decoder, depth=1), dtype="bfloat16", remat=True
)


def blueprint_of(config: ModelConfig = CONFIG) -> Blueprint:
    return make_blueprint(config, TrainConfig(accumulation=2))


def gather(shape: str, name: str) -> str:
    return f'  %{name} = {shape}{{1,0}} all-gather(%x), metadata={{op_name="at/{name}"}}\n'


def test_shards_of_the_state_on_one_chip():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    found = aot.shards(blueprint_of().state(mesh))
    assert sum(shard.local.bytes for shard in found) > 0
    assert [s.local.bytes for s in found] == sorted((s.local.bytes for s in found), reverse=True)
    by_name = {shard.name: shard for shard in found}
    # The head is trained, so float32: ids over `tensor`, width over `fsdp`. So are its moments.
    head = by_name["trainable language_model.head"]
    assert (head.full, head.local) == (Array("f32", (512, 128)), Array("f32", (128, 64)))
    moments = [s for name, s in by_name.items() if name.endswith("language_model.head")]
    assert [(s.full, s.local) for s in moments] == 3 * [(head.full, head.local)]
    up = by_name["frozen language_model.layers.up.weight"]
    assert up.local == Array("bf16", (2, 64, 64))
    assert by_name["step"].local == Array("s32", ())


def test_gathered_parameters_are_identified_by_shape():
    # Large enough to be listed: the head, and a stack of two layers.
    language = dataclasses.replace(CONFIG.language, vocabulary=4096, width=256, mlp=4096)
    blueprint = blueprint_of(dataclasses.replace(CONFIG, language=language))
    mesh = make_mesh(MeshConfig(fsdp=8))
    text = "ENTRY %main () -> f32[] {\n" + gather("bf16[256,4096]", "one") + "}\n"
    found = aot.gathered_parameters(text, blueprint, mesh)
    # One layer of `up` has the shape of the head; equal shapes cannot be distinguished.
    assert {g.name for g in found} == {"language_model.embedding", "language_model.head"}
    assert not any(g.stacked for g in found)
    assert found[0].gather.origin == "at/one"
    assert aot.vocabulary_gathers(text, 4096) == [found[0].gather]
    assert not aot.vocabulary_gathers(text, 512)

    text = text.replace("[256,4096]", "[2,4096,256]")
    stacks = aot.gathered_parameters(text, blueprint, mesh)
    assert {g.name.split(".")[2] for g in stacks} == {"gate", "up", "down"}
    assert all(g.stacked for g in stacks)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert aot.gathered_parameters(text, blueprint, one) == []  # nothing is sharded


@pytest.mark.tpu
def test_a_step_compiles_for_four_chips_and_gathers_no_vocabulary():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), aot.topology_devices("v5e:2x2"))
    assert mesh.devices.flat[0].device_kind == "TPU v5 lite"
    shape = {"batch": 8, "length": 64, "targets": 4, "masks": 28}
    compiled = aot.compile_step(blueprint_of(), mesh, **shape)
    state = sum(s.local.bytes for s in aot.shards(blueprint_of().state(mesh)))
    # The state, padded to tiles, and the batch.
    assert state < compiled.memory.arguments < 4 * state + (1 << 20)
    assert compiled.memory.temporaries > 0
    assert compiled.memory.peak < 16 << 30
    found = traffic(collectives(compiled.text))
    assert found["all-gather"].bytes > 0
    assert aot.vocabulary_gathers(compiled.text, CONFIG.language.vocabulary) == []
    # Two layers of the language model in each of two micro-batches.
    assert {instruction.runs for instruction in collectives(compiled.text)} >= {2, 4}


@pytest.mark.tpu
def test_command_prints_memory_and_gathers(tmp_path, capfd):
    values = {
        "model": dataclasses.asdict(CONFIG),
        "data": {"batch": 8, "length": 64, "targets": 4, "masks": 28},
        "train": {"accumulation": 2, "mesh": {"fsdp": 2, "tensor": 2}},
    }
    recipe = tmp_path / "small.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({pprint.pformat(values)})\n"
    )
    command = ["compile", "--config", str(recipe), "--topology", "v5e:2x2"]
    assert main(command) == 0
    output = capfd.readouterr().out
    assert "4 x TPU v5 lite, mesh data 1 x fsdp 2 x tensor 2" in output
    assert re.search(r"at most 0\.\d\d GiB of 16 GiB", output)
    assert "gathered nowhere: a stack of layers, the vocabulary" in output
    assert main([*command, "--config.data.batch=6"]) == 2
    assert "data.batch=6 is no multiple of 4" in capfd.readouterr().err


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:3x9", "nonsense"])
def test_unknown_topology_is_refused(topology):
    with pytest.raises(InputError, match=f"--topology {topology}: .*as in v5e:4x4"):
        aot.topology_devices(topology)


@pytest.mark.tpu
def test_step_that_does_not_fit_names_the_excess():
    vision = dataclasses.replace(CONFIG.vision, canvas=112 * 8, taps=(-2, -3))
    config = dataclasses.replace(CONFIG, vision=vision, remat=False)
    mesh = make_mesh(MeshConfig(), aot.topology_devices("v5e:2x2")[:1])
    with pytest.raises(InputError, match=r"exceeds available HBM \(15.75G\); take more"):
        aot.compile_step(blueprint_of(config), mesh, batch=256, length=8192, targets=64, masks=896)
