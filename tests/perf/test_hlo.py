"""Parser of compiled programs: by hand, and a scanned product compiled for eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixellm_jax.perf.hlo import Array, Instruction, Traffic, collectives, instructions, traffic

# Two rounds of an outer loop, three of an inner one in each; tiled layouts as on a TPU.
TEXT = """\
HloModule jit_step, entry_computation_layout={(f32[8,5]{1,0:T(8,128)})->f32[8,5]{1,0:T(8,128)}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (state: (s32[], bf16[7,5])) -> (s32[], bf16[7,5]) {
  %state = (s32[]{:T(128)}, bf16[7,5]{1,0:T(8,128)(2,1)}) parameter(0)
  %whole = bf16[7,5]{1,0:T(8,128)(2,1)} all-gather(%part), dimensions={0}, \
metadata={op_name="jit(step)/layer/weight"}
  ROOT %next = (s32[], bf16[7,5]{1,0}) tuple(%count, %whole)
}

%more (state: (s32[], f32[3])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[3]{0}) parameter(0)
  %count.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %limit = s32[]{:T(128)} constant(2)
  ROOT %less = pred[]{:T(512)} compare(%count.2, %limit), direction=LT
}

%outer.1 (state: (s32[], f32[3])) -> (s32[], f32[3]) {
  %loop = (s32[], bf16[7,5]{1,0}) while(%start), condition=%inner.more, body=%inner, \
backend_config={"known_trip_count":{"n":"3"},"other":1}
  %begun = (f32[3]{0}, f32[3]{0}) all-reduce-start(%gradient, %loss), to_apply=%add
  ROOT %done = (f32[3]{0}, s4[9]{0}) all-reduce-done(%begun)
}

ENTRY %main.5_spmd (p: f32[8,5]) -> f32[8,5] {
  %p = f32[8,5]{1,0:T(8,128)} parameter(0), sharding={devices=[8,1]<=[8]}
  %loop.2 = (s32[], f32[3]{0}) while(%p), condition=%more, body=%outer.1
  %flags = pred[<=8,5]{1,0} all-to-all(%p), dimensions={0}
  ROOT %out = f32[8,5]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%add
}
"""


def test_loops_and_asynchronous_pairs_by_hand():
    found = collectives(TEXT)
    assert found == [
        Instruction("all-gather", (Array("bf16", (7, 5)),), 6, "jit(step)/layer/weight"),
        Instruction("all-reduce", (Array("f32", (3,)), Array("s4", (9,))), 2, ""),
        Instruction("all-to-all", (Array("pred", (8, 5)),), 1, ""),
    ]
    assert [instruction.bytes for instruction in found] == [70, 12 + 5, 40]
    assert traffic(found) == {
        "all-gather": Traffic(1, 6, 420),
        "all-reduce": Traffic(1, 2, 34),
        "all-to-all": Traffic(1, 1, 40),
    }
    assert str(found[0].arrays[0]) == "bf16[7,5]"


def test_every_instruction_is_counted():
    runs = [(instruction.kind, instruction.runs) for instruction in instructions(TEXT)]
    # The sum is called in each round of the outer loop, and once by the fusion.
    assert runs.count(("add", 3)) == 1
    assert ("tuple", 6) in runs
    assert ("while", 2) in runs
    assert ("while", 1) in runs
    assert ("compare", 2) in runs  # not counted: the last run, when it is false
    assert len(runs) == 3 + 3 + 4 + 3 + 4


def test_gathers_of_a_scanned_product_are_counted_per_layer():
    layers, width, rows = 5, 32, 16
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=place)
    x = jax.ShapeDtypeStruct(
        (rows, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )

    def run(x: jax.Array, weights: jax.Array) -> jax.Array:
        pinned = NamedSharding(mesh, PartitionSpec("fsdp"))

        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.with_sharding_constraint(x @ weight, pinned), None

        return jax.lax.scan(layer, x, weights)[0]

    found = traffic(collectives(jax.jit(run).lower(x, weights).compile().as_text()))
    assert found == {"all-gather": Traffic(1, layers, layers * width * width * 4)}
