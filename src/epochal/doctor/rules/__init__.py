"""The rules, in the order in which they are told: what causes others first."""

# ruff: noqa: F401, I001  (what is imported adds its rules, and the order counts)
from epochal.doctor.rules import refused, wiring, softmaxes, scores, loss, targets, model, optimizer, schedule, data
from epochal.doctor.rules import alike, reading, loop, direction, probes, metrics, training, symptoms, fitting
