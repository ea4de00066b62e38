"""The meanings of all schedulers' fields, in one table. `help(DDIMScheduler)` shows them."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

MEANINGS = {
    "algorithm_type": "dpmsolver++ integrates predictions of x_0, dpmsolver predictions of the noise; sde- adds noise",
    "average": "average predictions of the noise, or predictions of the network's type (lower order with v_prediction)",
    "beta_end": "the variance of the noise that the last training timestep adds",
    "beta_schedule": "the curve of the variances from beta_start to beta_end",
    "beta_start": "the variance of the noise that the first training timestep adds",
    "clip_sample": "clip the predicted x_0 to +- clip_sample_range; for pixels, not for latents",
    "clip_sample_range": "the largest absolute value after clip_sample",
    "corrector_order": "the order of the corrector",
    "disable_corrector": "the indices of the steps without correction",
    "dynamic_thresholding_ratio": "the share of values that thresholding does not clip",
    "euler_at_final": "the last step has first order",
    "final_level": "the noise level after the last step: as set_alpha_to_one says, or always that of timestep 0",
    "final_sigmas_type": "the noise level after the last step: zero, or the lowest of training",
    "history": "the order of the first steps: by the number of known predictions, or by the index in the grid",
    "interpolation_type": "how to interpolate noise levels between two training timesteps",
    "lambda_min_clipped": "the lowest log-SNR at which a step may begin",
    "last_noise": "whether the last step adds noise: never, or as in diffusers unless it begins at timestep 0",
    "lower_order_final": "the last steps have a lower order if there are fewer than 15 steps",
    "noise_path": "one Brownian path for all numbers of steps, or diffusers' way: torchsde, another path for each grid",
    "noise_sampler_seed": "the random seed of the Brownian path; None: the generator draws it, one for each of a list",
    "noised_at": "the noise level of add_noise: that of the given timesteps, or that of the current step",
    "num_train_timesteps": "the number of timesteps in training",
    "original_inference_steps": "the number of timesteps with which the model was distilled",
    "predict_x0": "integrate predictions of x_0, not of the noise",
    "prediction_type": "what the network predicts: the noise, x_0, or v",
    "predictor_order": "the order of the predictor",
    "previous_timestep": "a step ends at the next timestep of the grid, or always num_train_timesteps // steps lower",
    "rescale_betas_zero_snr": "rescale the noise schedule so that its last timestep is pure noise",
    "rho": "the exponent of the Karras spacing: higher values give more low noise levels",
    "sample_max_value": "the largest factor by which thresholding scales down",
    "set_alpha_to_one": "the last step ends without noise, not at the noise level of timestep 0",
    "sigma_data": "the standard deviation of the training data",
    "sigma_max": "the first noise level of the Karras, exponential and beta spacings; None: the highest of training",
    "sigma_min": "the last noise level of the Karras, exponential and beta spacings; None: the lowest of training",
    "sigma_schedule": "the spacing of the noise levels from sigma_max to sigma_min",
    "skip_prk_steps": "begin without Runge-Kutta steps, as in every Stable Diffusion config",
    "solver_order": "the order of the solver; 2 is recommended with guidance, 3 without",
    "solver_p": "another scheduler as the predictor",
    "solver_type": "the second-order rule",
    "spaced_timesteps": "the network gets the exact timesteps of spaced noise levels, or whole numbers near them",
    "steps_offset": "a number added to every timestep of the leading grid; 1 for Stable Diffusion",
    "tau_func": "timestep -> stochasticity: 0 is the ODE, 1 the SDE; None: 1 from timestep 200 to 800, else 0",
    "third_order": "the third-order rule: correct, or diffusers' (half of the last term; a wrong sign with noise)",
    "thresholding": "scale down a predicted x_0 that leaves [-1, 1]; for pixels, not for latents",
    "timestep_scaling": "a factor of t in the boundary condition; the higher, the less the input counts (LCM, 4.1)",
    "timestep_spacing": "how to choose the timesteps of a run from those of training",
    "timestep_type": "the network gets the timestep, or a function of sigma",
    "trained_betas": "the list of variances, instead of beta_start, beta_end and beta_schedule",
    "use_beta_sigmas": "space the noise levels as quantiles of a beta distribution",
    "use_exponential_sigmas": "space the noise levels evenly in log sigma",
    "use_karras_sigmas": "space the noise levels evenly in sigma ** (1/7)",
    "use_lu_lambdas": "space the noise levels evenly in log-SNR",
    "variance_type": "the variance that the network also predicts; it is ignored",
    "zero_snr": "whether rescale_betas_zero_snr has an effect",
}
OF_FLOWS = ("flow_shift", "shift_terminal", "time_shift_type", "use_dynamic_shifting", "use_flow_sigmas")
MEANINGS |= dict.fromkeys(OF_FLOWS, "a field of flow models, without effect here")


def describe(doc: str, defaults: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> str:
    """A class's docstring, followed by its fields with their defaults, meanings and allowed values."""
    lines = []
    for name, default in defaults.items():
        values = f" One of {', '.join(map(repr, choices[name]))}." if len(choices.get(name, ())) > 1 else ""
        only = f" Only {choices[name][0]!r}." if len(choices.get(name, ())) == 1 else ""
        text = f"{name}={default!r}: {MEANINGS.get(name, 'a field of this class')}.{values}{only}"
        lines += textwrap.wrap(text, 116, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([inspect.cleandoc(doc), "", "Fields (arguments of the constructor):", "", *lines])


def signature(defaults: Mapping[str, Any]) -> inspect.Signature:
    """The signature of the constructor, for editors and `help`."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    fields = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    return inspect.Signature([*fields, inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default=None)])
