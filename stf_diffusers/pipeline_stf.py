"""`STFPipeline`: the folder that plain Diffusers loads, sampled with the solvers that Diffusers lacks."""

# No deferred annotations here: Diffusers reads those of __init__ when it loads a folder.
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional, Union

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from .consistency_sampling import intermediate_levels, is_consistency_model, sample_consistency
from .denoising import Denoiser, network_denoiser
from .export import METADATA_KEY, diffusers_pipeline, network_of, process_of, sampling_labels
from .posterior import check_tensor
from .sampling_call import (
    callback_after_step,
    check_counts,
    check_generator,
    check_output_type,
    check_solver,
    checked_class_labels,
    default_steps,
)
from .solvers import Discretization, sample_ode, sample_rk45
from .upload import upload_pipeline

Solver = Literal["heun", "euler", "rk45", "scheduler", "consistency"]


@dataclass
class STFPipelineOutput(BaseOutput):
    """`images`: a list of PIL images, (B, H, W, C) in [0, 1], or (B, C, H, W) in [0, 1]; `num_evaluations` of the network."""

    images: Any
    num_evaluations: int


class STFPipeline(DiffusionPipeline):
    """Samples of an image diffusion model trained on EDM, VE, VP, flow matching or a DDPM's timesteps.

    Reads the folders that the training script saves, and those of Diffusers' own DDPM, EDM and flow-matching models:
    ``STFPipeline.from_pretrained(folder)``. What it saves is again a folder of Diffusers' own classes.

    Args:
        unet: the network, if it is a `UNet2DModel`.
        scheduler: the Diffusers scheduler saved with it. Its config says what the network was trained on.
        transformer: the network, if it is a `DiTTransformer2DModel`.
        vae, vqvae: for a network of latents, the autoencoder that decodes them, under either of Diffusers' names
            for it.

    Raises:
        ValueError: there is no network or more than one, the scheduler does not say what the network was trained on, or
            belongs to another process.
    """

    model_cpu_offload_seq = "unet->transformer->vae->vqvae"
    _optional_components: ClassVar = ["unet", "scheduler", "transformer", "vae", "vqvae"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        # Diffusers 0.36 cannot read `X | None`.
        unet: Optional[UNet2DModel] = None,  # noqa: UP045
        scheduler: Any = None,
        transformer: Optional[DiTTransformer2DModel] = None,  # noqa: UP045
        # `from_pipe` hands on a part whose very class is named.
        vae: Optional[Union[ModelMixin, AutoencoderKL, AutoencoderDC, AutoencoderTiny]] = None,  # noqa: UP007, UP045
        vqvae: Optional[Union[ModelMixin, VQModel]] = None,  # noqa: UP007, UP045
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, transformer=transformer, vae=vae, vqvae=vqvae)
        self._check_parts()
        self.process = process_of(scheduler, network_of(self))

    def _check_parts(self) -> None:
        if self.scheduler is None or (self.unet is None) == (self.transformer is None):
            raise ValueError("STFPipeline needs a scheduler, and one network: a unet or a transformer.")

    @property
    def autoencoder(self) -> ModelMixin | None:
        """What decodes the network's latents; None where they are the images themselves."""
        return self.vqvae if self.vae is None else self.vae

    @property
    def components(self) -> dict[str, Any]:
        """The parts that are present, by name: ``STFPipeline(**pipeline.components)`` is the same pipeline."""
        return {name: part for name, part in super().components.items() if part is not None}

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call, for callbacks."""
        return self._num_timesteps

    @property
    def default_solver(self) -> Solver:
        """The solver of a call that names none: "consistency" if the folder says that it is such a model, else "heun"."""
        return "consistency" if is_consistency_model(self._metadata) else "heun"

    @property
    def _metadata(self) -> dict[str, Any]:
        return self.scheduler.config.get(METADATA_KEY) or {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "STFPipeline":
        """As `DiffusionPipeline.from_pretrained`, except that weights are read from safetensors only.

        Raises:
            ValueError: ``use_safetensors=False``: other weight files are pickles, which run code when loaded.
            OSError: there is no such pipeline, or its weights are not in safetensors.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("use_safetensors=False would load pickles. Save the weights as safetensors once instead.")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        class_labels: Tensor | Sequence[int] | Sequence[str] | int | str | None = None,
        guidance_scale: float = 1.0,
        solver: Solver | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        return_dict: bool = True,
        *,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        tolerance: float = 1e-5,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> STFPipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: B.
            num_inference_steps: N. "heun" evaluates the network 2N - 1 times, the others N times; "rk45" chooses its steps
                itself. None: 18; 1 for "consistency", or one more than there are `sigmas`.
            class_labels: for a class-conditional network, one label for each image or one for all, or the names of classes
                that were saved with it.
            guidance_scale: scale of classifier-free guidance (1: none); the network must know a dropped condition.
            solver: solver of the probability-flow ODE: "heun" or "euler" on Karras et al. 2022's steps (eq. 5); "rk45",
                adaptive (needs scipy); or "scheduler", the saved Diffusers scheduler's own. "consistency": the network is a
                consistency model, which makes images in one step, or few with fresh noise between them. None: the
                pipeline's `default_solver`.
            generator: one generator, or a list with one for each image: then image k is a function of generator k
                alone, whatever the batch.
            latents: (B, C, H, W) standard normal, instead of draws.
            output_type: "pil" (1, 3 or 4 channels), "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1]; or "latent",
                (B, C, H, W) as the network has them: neither decoded nor clipped.
            callback_on_step_end: as elsewhere in Diffusers, ``callback(pipeline, step, timestep, {"latents": x})`` with
                the timestep that the network saw at the start of the step; ``{"latents": ...}``, if it returns that, is
                what the next step starts from. Not with "rk45".
            return_dict: False: a tuple (images,).
            callback_on_step_end_tensor_inputs: names of the tensors that the callback is given; only "latents".
            tolerance: relative and absolute tolerance of each step of "rk45". Errors add up along the path: images of a
                trained VE or VP network are off by a few hundred times the tolerance.
            sigmas: the N - 1 noise levels between the steps of "consistency", decreasing. None: those saved for N, or else
                those of `intermediate_levels`.

        Raises:
            ValueError: arguments that do not fit the network or each other.
            TypeError: numbers, labels, generators or latents of another type.
        """
        self._check_parts()
        process_of(self.scheduler, network_of(self))  # either may have been replaced
        generator = list(generator) if isinstance(generator, tuple) else generator
        solver = self.default_solver if solver is None else solver
        num_inference_steps = default_steps(solver, sigmas) if num_inference_steps is None else num_inference_steps
        check_counts(batch_size=batch_size, num_inference_steps=num_inference_steps)
        check_generator(generator, batch_size)
        check_solver(solver, guidance_scale, callback_on_step_end, sigmas)
        check_output_type(output_type, self.channels)
        on_step_end = callback_after_step(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._num_timesteps = num_inference_steps
        labels = self._labels(class_labels, batch_size, self._execution_device)
        latents = self._initial_noise(batch_size, generator, latents)
        images, evaluations = self._samples(
            solver, num_inference_steps, latents, labels, guidance_scale, generator, on_step_end, tolerance, sigmas
        )
        result = self._output(images, output_type)
        self.maybe_free_model_hooks()
        return STFPipelineOutput(images=result, num_evaluations=evaluations) if return_dict else (result,)

    def _samples(
        self, solver: Solver, num_steps: int, latents: Tensor, labels: Tensor | None, guidance_scale: float,
        generator: Any, on_step_end: Any, tolerance: float, sigmas: Any,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Images as the network has them, and the number of its evaluations."""
        if solver == "scheduler":
            return self._scheduler_samples(latents, num_steps, labels, generator, on_step_end)
        denoise = network_denoiser(
            network_of(self),
            self.process,
            class_labels=labels,
            guidance_scale=guidance_scale,
            null_label=self._metadata.get("null_label"),
        )
        if solver == "rk45":
            return self._adaptive_samples(denoise, latents, tolerance)
        if solver == "consistency":
            return self._few_step_samples(denoise, latents, num_steps, sigmas, generator, on_step_end), num_steps
        images = self._ode_samples(denoise, latents, num_steps, solver, on_step_end)
        return images, 2 * num_steps - 1 if solver == "heun" else num_steps

    def _output(self, images: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return images.to(network_of(self).dtype)
        if self.autoencoder is not None:
            scale = self.autoencoder.config.get("scaling_factor", 1.0)
            images = self.autoencoder.decode((images / scale).to(self.autoencoder.dtype)).sample.to(torch.float64)
        pictures = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pictures
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def _initial_noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """(B, C, H, W) float64, drawn where no `latents` are given."""
        config, device = network_of(self).config, self._execution_device
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, config["in_channels"], height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        check_tensor("latents", latents, str(shape))
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}; got {tuple(latents.shape)}.")
        return latents.to(device, torch.float64)

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        if self.autoencoder is None:
            return int(network_of(self).config["in_channels"])
        config = self.autoencoder.config
        return int(config.get("out_channels") or config["in_channels"])

    def _labels(self, class_labels: Any, batch_size: int, device: torch.device) -> Tensor | None:
        plain = sampling_labels(network_of(self), self._metadata)
        if not plain:
            if class_labels is not None:
                raise ValueError("the network is unconditional: leave class_labels out.")
            return None
        if class_labels is None:
            if len(plain) > 1:
                raise ValueError(
                    f"the network is class-conditional: pass class_labels, integers from {plain[0]} to {plain[-1]}."
                )
            class_labels = plain[0]
        config = network_of(self).config
        # The transformer has one more embedding than its config says, for the dropped condition.
        classes = config["num_embeds_ada_norm"] + 1 if "num_embeds_ada_norm" in config else config["num_class_embeds"]
        names = self._metadata.get("class_names") or ()
        return checked_class_labels(class_labels, batch_size, classes, device, names)

    def _sigma_range(self) -> tuple[float, float]:
        low, high = self.process.sampling_range()
        if self.process.scheduler_family != "edm":
            return low, high
        # EDM networks are trained at all noise levels; the scheduler's config has those to sample at.
        config = self.scheduler.config
        return config.get("sigma_min", low), config.get("sigma_max", high)

    def _ode_samples(
        self, denoise: Denoiser, latents: Tensor, num_steps: int, method: Literal["heun", "euler"], on_step_end: Any
    ) -> Tensor:
        discretization = Discretization.edm(num_steps, *self._sigma_range())
        with self.progress_bar(total=num_steps) as progress:
            after_step = self._after_step(progress, discretization.times[:-1], on_step_end)
            return sample_ode(denoise, latents, discretization, method=method, on_step_end=after_step)

    def consistency_levels(
        self, num_inference_steps: int, sigmas: Sequence[float] | Tensor | None = None
    ) -> list[float]:
        """The N noise levels that the steps of "consistency" start from: the largest, and `sigmas` as in a call."""
        low, high = self._sigma_range()
        low = 0.0 if self.process.scheduler_family == "edm" else low  # EDM networks are trained at all levels
        saved = self._metadata.get("consistency_sigmas")
        return [high, *intermediate_levels(num_inference_steps, high, sigmas=sigmas, saved=saved, sigma_min=low)]

    def _few_step_samples(
        self, denoise: Denoiser, latents: Tensor, num_steps: int, sigmas: Any, generator: Any, on_step_end: Any
    ) -> Tensor:
        levels = self.consistency_levels(num_steps, sigmas)
        with self.progress_bar(total=num_steps) as progress:
            after_step = self._after_step(
                progress, torch.tensor(levels, dtype=torch.float64, device="cpu"), on_step_end
            )
            return sample_consistency(denoise, latents, levels, generator=generator, on_step_end=after_step)

    def _after_step(self, progress: Any, levels: Tensor, on_step_end: Any) -> Callable[[int, Tensor], Tensor]:
        timesteps = self.process.timestep(self.process.time_of(levels))

        def after_step(step: int, x: Tensor) -> Tensor:
            progress.update()
            return on_step_end(step, timesteps[step], x)

        return after_step

    def _adaptive_samples(self, denoise: Denoiser, latents: Tensor, tolerance: float) -> tuple[Tensor, int]:
        sigma_min, sigma_max = self._sigma_range()
        bar = {**getattr(self, "_progress_bar_config", {}), "unit": "evaluation"}
        with tqdm(**bar) as progress:

            def counted(x: Tensor, sigma: Tensor) -> Tensor:
                progress.update()
                return denoise(x, sigma)

            images, evaluations = sample_rk45(
                counted, latents, sigma_min=sigma_min, sigma_max=sigma_max, rtol=tolerance, atol=tolerance
            )
        return images, evaluations

    def _scheduler_samples(
        self, latents: Tensor, num_steps: int, labels: Tensor | None, generator: Any, on_step_end: Any
    ) -> tuple[Tensor, int]:
        """The loop of Diffusers, with what some of its pipelines leave out: initial scale and input scaling."""
        self.scheduler.set_timesteps(num_steps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        network, labelled = network_of(self), {} if labels is None else {"class_labels": labels}
        # Flow-matching schedulers have neither: they start from the noise and take the input as it is.
        x = latents.to(network.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        self._num_timesteps = len(self.scheduler.timesteps)
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = network(scale(x, t), t.expand(len(x)), **labelled).sample
            x = on_step_end(step, t, self.scheduler.step(output, t, x, **extra).prev_sample)
        return x.to(torch.float64), len(self.scheduler.timesteps)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as a pipeline of Diffusers' own classes, which plain Diffusers loads.

        A scheduler of another library (`EDMHeunScheduler`) is saved as the one that the training would have saved.

        Raises:
            ValueError: ``safe_serialization=False``: a folder of pickles is one that `from_pretrained` does not read.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError(
                "safe_serialization=False saves pickles, which run code when loaded and which from_pretrained does not "
                "read. Leave it out: weights are saved as safetensors."
            )
        self._check_parts()
        network, metadata = network_of(self), self.scheduler.config.get(METADATA_KEY)
        edm = self.process.scheduler_family == "edm"
        sampling_range = dict(zip(("sigma_min", "sigma_max"), self._sigma_range(), strict=True)) if edm else {}
        stock = diffusers_pipeline(network, self.process, vae=self.autoencoder, metadata=metadata, **sampling_range)
        if type(self.scheduler).__module__.startswith("diffusers."):
            stock.register_modules(scheduler=self.scheduler)
        stock.save_pretrained(save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload pipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        variant: str | None = None,
        dataset: str | None = None,
        license: str | None = None,
        metrics: dict[str, float] | None = None,
        num_samples: int = 16,
    ) -> str:
        """Upload as a pipeline of Diffusers' own classes, with a model card of how it was trained.

        Args:
            repo_id: repository, made where missing.
            commit_message, private, token, create_pr, variant: as elsewhere in Diffusers.
            dataset, license, metrics: for the card, as in `model_card`.
            num_samples: images in the card's sample grid (seeds 0, 1, ...; "heun" in 18 steps). 0: no grid.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        return upload_pipeline(
            self, repo_id, commit_message=commit_message, private=private, token=token, create_pr=create_pr,
            variant=variant, dataset=dataset, license=license, metrics=metrics, num_samples=num_samples,
        )  # fmt: skip
