"""The guard's learned numbers. Made by scripts/guard/train.py: change that, not this.

Learned from Banking77 (CC BY 4.0, PolyAI) and CLINC150 (CC BY 3.0, Larson et al.), and from pairs of the project's own;
see scripts/guard/data/README.md.
"""

from __future__ import annotations

CALIBRATION = (
    (0.001, 1.0),
    (0.002, 1.0),
    (0.005, 0.9999),
    (0.01, 0.999),
    (0.015, 0.998),
    (0.02, 0.9958),
    (0.03, 0.9911),
    (0.04, 0.9851),
    (0.05, 0.978),
    (0.07, 0.9698),
    (0.1, 0.9399),
    (0.15, 0.8549),
    (0.2, 0.741),
    (0.3, 0.3708),
)
"""Error rate, and the lowest score that keeps it. Rates rise, scores fall."""

INTERCEPT = -13.4498

COEFFICIENTS = (
    14.8393,
    6.6331,
    2.6098,
    8.1332,
    -4.9426,
    -3.7568,
    -1.2620,
    -1.7160,
    -0.2786,
    -0.9305,
    0.6508,
    -1.8509,
    0.2209,
    -1.2715,
)
"""In the order of `guard.features`."""
