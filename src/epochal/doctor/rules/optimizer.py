"""Rules over the settings of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from epochal.doctor.case import NORMS, Case
from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.wiring import named

ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)  # AdamW is an Adam
HIGHEST = 0.5  # of an Adam's rate: it moves each weight by as much in an update
HIGHEST_OF_OTHERS = 30.0


@rule("absurd-lr", "error", "settings", told="static")
def absurd_lr(case: Case) -> Iterator[Seen]:
    """The learning rate cannot be meant: at 0 nothing moves, and an Adam moves every weight by it in each update.

    Looks at the rates of all groups: 0 without a schedule is an error; for the family of Adam above 0.5, and for SGD
    above 30, a warning. Weights are about 0.01 to 1 in size.
    """
    groups = case.optimizer.param_groups if case.optimizer is not None else []
    highest = HIGHEST if isinstance(case.optimizer, ADAMS) else HIGHEST_OF_OTHERS
    rates, told = [float(group["lr"]) for group in groups if "lr" in group], None  # a schedule was applied to them
    if rates and max(rates) <= 0 and case.run.state.schedule is None:
        is_own = case.plan.step is not None  # which may set the rate from update to update
        told = 0.0, "nothing is trained", "warning" if is_own else "error"
    elif rates and max(rates) > highest:
        told = max(rates), f"{highest:g} at most", "warning"
    if told:
        yield Seen(
            f"the learning rate is {told[0]:g}.",
            f"lr {told[0]:g} ({told[1]}) of {type(case.optimizer).__name__}",
            case.place,
            "give lr=1e-3 for the family of Adam, 0.01 to 0.1 for SGD",
            level=told[2],
        )


@rule("odd-betas", "warning", "settings", told="static")
def odd_betas(case: Case) -> Iterator[Seen]:
    """Adam divides by a running mean of squares: it has to be slower than the mean it divides, and never 0.

    Looks at betas and eps: beta2 below beta1 makes updates of any size; eps below 1e-12 (below 1e-8 for weights of half
    precision), or above 0.1, makes the division meaningless.
    """
    for group in case.optimizer.param_groups if case.optimizer is not None else ():
        betas, eps = group.get("betas"), group.get("eps")
        is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"])
        least = 1e-8 if is_half else 1e-12
        if betas is not None and float(betas[1]) < float(betas[0]):
            told = f"betas are {tuple(map(float, betas))}: the second has to be the higher one", "betas=(0.9, 0.999)"
        elif betas is not None and eps is not None and not least <= float(eps) <= 0.1:
            told = f"eps is {float(eps):g}: it has to lie from {least:g} to 0.1", "eps=1e-8"
        else:
            continue
        yield Seen("settings of the optimizer are not those of an Adam that works.", told[0],
                   f"{type(case.optimizer).__name__}, {case.place}", f"give {told[1]}")  # fmt: skip
        return


@rule("divergence", "error", "settings", told="static")
def endless_momentum(case: Case) -> Iterator[Seen]:
    """A momentum of 1 never slows down: the weights swing wider and wider.

    Looks at the momentum of each group: it has to be below 1.
    """
    for group in case.optimizer.param_groups if case.optimizer is not None else ():
        momentum = max(float(group.get("momentum") or 0), *(float(one) for one in group.get("betas") or (0.0,)))
        if momentum >= 1:
            yield Seen("the momentum never slows down, and the weights will diverge.", f"{momentum:g} (below 1)",
                       f"{type(case.optimizer).__name__}, {case.place}", "give momentum=0.9")  # fmt: skip
            return


@rule("decayed-norms", "info", "settings", told="static")
def decayed_norms(case: Case) -> Iterator[Seen]:
    """Weight decay pulls the scales of norms, and biases, towards 0, where they do not belong.

    Looks at the groups with a weight decay of at least 0.05 that hold one-dimensional weights of norms. Usual
    practice leaves norms, biases and embeddings out of the decay. Where they have more of it than the matrices, that
    is a warning.
    """
    norms = {
        id(p): f"{path}.{name}" for path, module in case.model.named_modules() if isinstance(module, NORMS)
        for name, p in module.named_parameters(recurse=False) if p.requires_grad
    }  # fmt: skip
    found = [
        norms[key] for key, group in case.held.items() if key in norms and (group.get("weight_decay") or 0) >= 0.05
    ]
    if found:
        group = next(group for key, group in case.held.items() if key in norms)
        yield Seen(
            "weight decay is applied to the scales of norms.",
            f"weight_decay {group['weight_decay']:g} (0.05 at least) for {len(found)} parameters",
            named(found),
            "make two groups: p.dim() > 1 with the decay, all others with weight_decay=0",
            level="warning" if _is_swapped(case, group["weight_decay"]) else None,
        )


def _is_swapped(case: Case, decay: float) -> bool:
    """Whether matrices are decayed less than the scales of norms."""
    groups = [case.held[id(p)] for p in case.trained.values() if p.dim() > 1 and id(p) in case.held]
    return bool(groups) and all((group.get("weight_decay") or 0.0) < decay for group in groups)
