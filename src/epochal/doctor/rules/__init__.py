"""The rules, in the order in which they are told: what causes others first."""

from epochal.doctor.rules import (
    refused,
    wiring,
    model,
    loss,
    targets,
    optimizer,
    schedule,
    data,
    loop,
    probes,
    symptoms,
)  # noqa: F401, I001  (the order counts)
