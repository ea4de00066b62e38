"""What the schedulers' fields mean, in one table, from which `help(DDIMScheduler)` is made."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

MEANINGS = {
    "algorithm_type": "dpmsolver++ integrates the prediction of x_0, dpmsolver that of the noise; sde- adds noise",
    "average": "what is averaged over steps: the noise, or the prediction as it comes, of less order with v_prediction",
    "beta_end": "variance of the noise that the last training timestep adds",
    "beta_schedule": "how the variances lie between beta_start and beta_end",
    "beta_start": "variance of the noise that the first training timestep adds",
    "clip_sample": "cut the guess at x_0 off at clip_sample_range: for pixels, not for latents",
    "clip_sample_range": "where clip_sample cuts off",
    "corrector_order": "the order of the corrector",
    "disable_corrector": "the steps, by their places, that are not corrected",
    "dynamic_thresholding_ratio": "the share of values that thresholding leaves alone",
    "euler_at_final": "make the last step of first order",
    "final_level": "where the last step ends: as set_alpha_to_one says, or always at the level of timestep 0",
    "final_sigmas_type": "the noise level after the last step: none, or the lowest of training",
    "history": "where a run begins, the weights of the predictions that there are, or of as many as its place allows",
    "interpolation_type": "how noise levels between two training timesteps are found",
    "lambda_min_clipped": "the lowest log-SNR at which a step may begin",
    "last_noise": "whether the step that ends clean adds noise; as in diffusers, unless it begins at timestep 0",
    "lower_order_final": "lower the order in the last steps of a run of less than 15",
    "noise_path": "a Brownian path for all numbers of steps, or as in diffusers, one of torchsde for each grid",
    "noise_sampler_seed": "which Brownian path; None: drawn from the generator, one path for each of a list",
    "noised_at": "add_noise: the noise of the timesteps given, or of the place where a run stands",
    "num_train_timesteps": "steps of the noise schedule that the network was trained with",
    "original_inference_steps": "the timesteps on which the model was distilled",
    "predict_x0": "integrate the prediction of x_0, not of the noise",
    "prediction_type": "what the network predicts: the noise, x_0, or v",
    "predictor_order": "the order of the predictor",
    "previous_timestep": "where a step ends: at the next timestep of the grid, or a fixed number below, off the grid",
    "rescale_betas_zero_snr": "rescale the schedule so that its last timestep is noise alone",
    "rho": "how much denser the noise levels are at the low end",
    "sample_max_value": "the most that thresholding scales down by",
    "set_alpha_to_one": "end at clean samples, not at the level of timestep 0",
    "sigma_data": "the standard deviation of the data that the model was trained with",
    "sigma_max": "the first noise level of the Karras, exponential and beta spacings; None: as trained",
    "sigma_min": "the last noise level of the Karras, exponential and beta spacings; None: as trained",
    "sigma_schedule": "how the noise levels lie between sigma_max and sigma_min",
    "skip_prk_steps": "begin without Runge-Kutta steps, as every Stable Diffusion folder asks for",
    "solver_order": "the order of the solver; 2 with guidance, 3 without",
    "solver_p": "another scheduler as the predictor",
    "solver_type": "which of two second-order rules",
    "spaced_timesteps": "what the network is told of spaced noise levels: their timesteps, or whole numbers near them",
    "steps_offset": "added to every timestep of the leading grid; Stable Diffusion has 1",
    "tau_func": "how stochastic a step is, by its timestep: 0 the ODE, 1 the SDE; None: 1 from 200 to 800",
    "third_order": "the third-order rule, or as in diffusers: the last term halved, with noise a sign turned",
    "thresholding": "scale the guess at x_0 down where it leaves [-1, 1]: for pixels, not for latents",
    "timestep_scaling": "how fast the model's answer takes over from its input as t rises (LCM, section 4.1)",
    "timestep_spacing": "how the timesteps of a run are spread over those of training",
    "timestep_type": "what the network is told: the timestep, or a function of sigma",
    "trained_betas": "the variances themselves, in place of beta_start, beta_end and beta_schedule",
    "use_beta_sigmas": "space the noise levels as quantiles of a beta distribution",
    "use_exponential_sigmas": "space the noise levels evenly in log sigma",
    "use_karras_sigmas": "space the noise levels evenly in sigma ** (1/7)",
    "use_lu_lambdas": "space the noise levels evenly in log-SNR",
    "variance_type": "of networks that predict a variance, too, which is cut off",
    "zero_snr": "whether rescale_betas_zero_snr is heeded",
}
OF_FLOWS = ("flow_shift", "shift_terminal", "time_shift_type", "use_dynamic_shifting", "use_flow_sigmas")
MEANINGS |= dict.fromkeys(OF_FLOWS, "a field of flow models, without effect here")


def describe(doc: str, defaults: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> str:
    """A class's docstring with its fields below: defaults, meanings and what they may be."""
    lines = []
    for name, default in defaults.items():
        values = f" One of {', '.join(map(repr, choices[name]))}." if len(choices.get(name, ())) > 1 else ""
        only = f" Only {choices[name][0]!r}." if len(choices.get(name, ())) == 1 else ""
        text = f"{name}={default!r}: {MEANINGS.get(name, 'a field of this class')}.{values}{only}"
        lines += textwrap.wrap(text, 116, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([inspect.cleandoc(doc), "", "Fields, keywords of the constructor:", "", *lines])


def signature(defaults: Mapping[str, Any]) -> inspect.Signature:
    """What the constructor takes, as editors and `help` show it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    fields = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    return inspect.Signature([*fields, inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default=None)])
