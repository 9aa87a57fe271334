"""Values of the samplers' options to test: each tuple is one axis, each of its entries the options of one setting.

The tests of a sampler combine some of them, so that every pair of settings appears (a covering sample); ``grid.py``
takes their products.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

SD: Config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# linspace is the default of all methods but DDPM, DDIM and PNDM, and only leading heeds the offset
SPACINGS: tuple[Config, ...] = (
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
)
SPACINGS_FROM_LEADING: tuple[Config, ...] = (
    {},
    {"steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "steps_offset": 1},
)
SIGMAS: tuple[Config, ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
SIGMAS_AND_LU: tuple[Config, ...] = (*SIGMAS, {"use_lu_lambdas": True})
ENDS: Config = {"sigma_min": 0.05, "sigma_max": 20.0}
CHURN: tuple[Config, ...] = (
    {},
    {"s_churn": 0.7},
    {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.003},
    {"s_churn": 5.0, "s_tmax": float("inf")},
)
TO_MIN: Config = {"final_sigmas_type": "sigma_min"}
ZERO_SNR: Config = {"rescale_betas_zero_snr": True}
LINEAR: Config = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE: Config = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
BETAS = [0.0005 + 0.00002 * i for i in range(1000)]
SCHEDULES: tuple[Config, ...] = (LINEAR, COSINE, {"trained_betas": BETAS}, {"num_train_timesteps": 400})
