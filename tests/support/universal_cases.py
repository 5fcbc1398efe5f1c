"""Engines that save universal checkpoints, and those that load them."""

from __future__ import annotations

GROWN = 128


def case(stage, kind="", **more):
    """``kind`` is "", "tied", "bf16", "typed", or "mpu" for an mpu instead of AutoTP."""
    kinds = {name: kind == name for name in ("tied", "bf16", "typed", "mpu")}
    return {"stage": stage, **kinds, **more}


def loading(source, stage, kind="", **more):
    return case(stage, kind, load=f"{source} universal", **more)


# What is trained and saved.
STAGES = range(4)
TRAINED = {
    **{f"z{s}": case(s, export=True) for s in STAGES},
    **{f"z{s} tied": case(s, "tied", export=True) for s in STAGES},
    **{f"z{s} typed": case(s, "typed", export=True) for s in STAGES},
    **{f"z{s} bf16": case(s, "bf16", export=True) for s in (1, 2, 3)},
    **{f"z{s} mpu": case(s, "mpu", export=True) for s in STAGES},
}
# What is loaded by DeepSpeed itself, into an engine of the same kind.
OWN = {
    f"{name} again": {**what, "own": name, "export": False}
    for name, what in TRAINED.items()
    if name.removeprefix("z")[1:] in ("", " tied", " mpu")
}
TRAINED_DP = {f"dp z{s}": case(s, export=True) for s in STAGES}


# What is loaded into engines, by the layout of their ranks.
LOADED_DP = {
    "z1 to dp z3": loading("z1", 3),
    "z3 tied to dp z1": loading("z3 tied", 1, "tied"),
    "z2 typed to dp z0": loading("z2 typed", 0, "typed"),
}
LOADED_TP = {
    **{f"z{s} to z{t}": loading(f"z{s}", t) for s in STAGES for t in STAGES if s != t},
    **{f"z{s} tied to z{3 - s}": loading(f"z{s} tied", 3 - s, "tied") for s in STAGES},
    **{f"z{s} typed to z{3 - s}": loading(f"z{s} typed", 3 - s, "typed") for s in STAGES},
    **{f"z{s} bf16 to z{t}": loading(f"z{s} bf16", t, "bf16") for s, t in ((1, 3), (2, 1), (3, 2))},
    **{f"z{s} mpu to z{3 - s} mpu": loading(f"z{s} mpu", 3 - s, "mpu") for s in STAGES},
    **{f"z{s} mpu to z{3 - s}": loading(f"z{s} mpu", 3 - s) for s in (1, 3)},
    **{f"z{s} to z{3 - s} mpu": loading(f"z{s}", 3 - s, "mpu") for s in (0, 2)},
    **{f"dp z{s} to z{3 - s}": loading(f"dp z{s}", 3 - s) for s in STAGES},
    **{f"grown to z{t}": loading("grown", t, vocab=GROWN) for t in (0, 1, 3)},
    "errors": case(
        1,
        errors=[
            "z1",
            "z1 tied universal",
            "z1 typed universal",
            "grown universal",
            "no schedule",
            "other steps",
        ],
    ),
}
LOADED_ALONE = {
    "z0 to alone z1": loading("z0", 1),
    "z1 to alone z0": loading("z1", 0),
    "z2 tied to alone z3": loading("z2 tied", 3, "tied"),
    "z3 typed to alone z2": loading("z3 typed", 2, "typed"),
    "no frozen": case(1, "typed", load="no frozen", strict=False),
    "z0 bf16": case(0, "bf16", errors=["z1 bf16 universal"]),
    "round robin": case(2, "bf16", round_robin=True, errors=["z1 bf16 universal"]),
}
# AutoTP would leave half of four ranks without a head of attention.
LOADED_FOUR = {
    "z1 to four z3": loading("z1", 3, "mpu"),
    "z3 mpu to four z0": loading("z3 mpu", 0, "mpu"),
}
OTHERS = ("errors", "no frozen", "z0 bf16", "round robin")
ALL_LOADED = LOADED_DP | LOADED_TP | LOADED_ALONE | LOADED_FOUR
LOADED = {name: how for name, how in ALL_LOADED.items() if name not in OTHERS}
