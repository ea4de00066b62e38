"""The names that programs use for solvers, and what they mean here, for Python and for the command line."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import minit2v.schedulers as solvers
from minit2v_convert.rename import nearest

from .base import Scheduler
from .sigma import SPACINGS


class Named(NamedTuple):
    """A solver: its short name, its class, the fields that the name sets, and its names in other programs."""

    name: str
    solver: str
    fields: dict[str, Any]
    a1111: str = ""
    comfyui: str = ""  # k-diffusion's name is the same with the prefix sample_


SDE = {"algorithm_type": "sde-dpmsolver++"}
NAMES = (
    Named("ddim", "DDIMScheduler", {}, "DDIM", "ddim"),
    Named("ddpm", "DDPMScheduler", {}, "", "ddpm"),
    Named("pndm", "PNDMScheduler", {}),
    Named("plms", "PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    Named("euler", "EulerDiscreteScheduler", {}, "Euler", "euler"),
    Named("euler-a", "EulerAncestralDiscreteScheduler", {}, "Euler a", "euler_ancestral"),
    Named("lms", "LMSDiscreteScheduler", {}, "LMS", "lms"),
    Named("heun", "HeunDiscreteScheduler", {}, "Heun", "heun"),
    Named("dpm2", "KDPM2DiscreteScheduler", {}, "DPM2", "dpm_2"),
    Named("dpm2-a", "KDPM2AncestralDiscreteScheduler", {}, "DPM2 a", "dpm_2_ancestral"),
    Named("dpm++-2s", "DPMSolverSinglestepScheduler", {"solver_order": 2}),
    Named("dpm++-2m", "DPMSolverMultistepScheduler", {"solver_order": 2}, "DPM++ 2M", "dpmpp_2m"),
    Named("dpm++-3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    Named("dpm++-sde", "DPMSolverSDEScheduler", {}, "DPM++ SDE", "dpmpp_sde"),
    Named("dpm++-2m-sde", "DPMSolverMultistepScheduler", SDE | {"solver_order": 2}, "DPM++ 2M SDE", "dpmpp_2m_sde"),
    Named("dpm++-2m-sde-heun", "DPMSolverMultistepScheduler", SDE | {"solver_order": 2, "solver_type": "heun"},
          "DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun"),
    Named("dpm++-3m-sde", "DPMSolverMultistepScheduler", SDE | {"solver_order": 3}, "DPM++ 3M SDE", "dpmpp_3m_sde"),
    Named("unipc", "UniPCMultistepScheduler", {}, "UniPC", "uni_pc"),
    Named("unipc-bh2", "UniPCMultistepScheduler", {"solver_type": "bh2"}, "", "uni_pc_bh2"),
    Named("deis", "DEISMultistepScheduler", {}, "", "deis"),
    Named("sa", "SASolverScheduler", {}, "", "sa_solver"),
    Named("lcm", "LCMScheduler", {}, "LCM", "lcm"),
    Named("tcd", "TCDScheduler", {}, "TCD"),
)  # fmt: skip

ENDINGS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm": {"timestep_spacing": "trailing"},
}
_ALSO = {"sgm-uniform": ENDINGS["sgm"]}  # ComfyUI's
_SHORTER = {"dpm++": "dpm++-2m", "dpmsolver++": "dpm++-2m"}


def solver_of(name: str) -> tuple[type[Scheduler], dict[str, Any]]:
    """The class of a name, and the fields that the name sets. Raises ValueError like `scheduler_of`."""
    key = _key(name)
    key, endings = _SHORTER.get(key, key), ENDINGS | _ALSO
    known = {_key(solver): Named("", solver, {}) for solver in solvers.__all__}
    for row in reversed(NAMES):
        others = [row.a1111, row.comfyui, row.comfyui and f"sample-{row.comfyui}"]
        known |= {_key(other): row for other in (row.name, *others) if other}
    ending = next((e for e in endings if key.endswith(f"-{e}") and key.removesuffix(f"-{e}") in known), None)
    row = known.get(key if ending is None else key.removesuffix(f"-{ending}"))
    if row is None:
        raise ValueError(f"no scheduler is called {name!r}{nearest(key, sorted(known))}")
    cls = getattr(solvers, row.solver)
    own, fields = cls.field_defaults(), dict(row.fields)
    if ending is not None:
        if missing := [field for field in endings[ending] if field not in own]:
            raise ValueError(f"{name!r}: leave out the ending -{ending}, because {row.solver} has no {missing[0]}")
        fields |= dict.fromkeys((s for s in SPACINGS if s in own), False) | endings[ending]
    return cls, fields


def scheduler_of(name: str, config: Mapping[str, Any] | None = None, *, compat: str | None = None) -> Scheduler:
    """The solver with this name. config: the config of the model's scheduler.

    name: a class ("LMSDiscreteScheduler"), a short name ("lms"), or a name of A1111, ComfyUI or k-diffusion. The
    endings -karras, -exponential, -beta and -sgm choose the spacing of the noise levels or timesteps.
    Raises ValueError if the name is unknown, or if the solver does not support the ending.
    """
    cls, fields = solver_of(name)
    return cls.from_config(config or {}, compat=compat, **fields)


def _key(name: str) -> str:
    """The name in one spelling: "DPM++ 2M Karras", "dpmpp_2m_karras" and "dpm++-2m-karras" are the same."""
    return name.strip().lower().replace("_", "-").replace(" ", "-").replace("dpmpp", "dpm++")


def table() -> str:
    """The table of names that `--scheduler help` prints."""
    rows = [("name", "A1111", "ComfyUI, k-diffusion", "class and fields")]
    for row in NAMES:
        fields = ", ".join(f"{field}={value!r}" for field, value in row.fields.items())
        rows.append((row.name, row.a1111, row.comfyui, f"{row.solver}({fields})"))
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(v.ljust(w) for v, w in zip(row, wide, strict=False)), row[3]]) for row in rows]
    endings = ", ".join(f"-{e} ({', '.join(f'{k}={v!r}' for k, v in f.items())})" for e, f in ENDINGS.items())
    return "\n".join([*lines, "", f"Endings: {endings}.", f"Or a class by its name: {', '.join(solvers.__all__)}."])
