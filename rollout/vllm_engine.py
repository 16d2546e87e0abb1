"""Engine on vLLM, inside the calling process; the only file that imports vllm.

vLLM expands the image placeholders itself; the expansion is checked against the renderer's on every prompt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from rollout.render import Renderer
from rollout.seeds import prompt_seed
from rollout.types import Group, Prompt, Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so weights are handed over by reference
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the learner's threads live here too
}
_MAX_NAMED = 5  # weights spelled out in an error


class VLLMEngine:
    """Samples with vLLM on a GPU, or on the CPU in float32.

    Log-probs are those of the distribution drawn from: placeholders banned, then temperature, then top-p. At
    temperature 0 they are those of temperature 1, of which the most likely token is taken.

    Args:
        path: folder or hub name of the model, as transformers saves it, with its processor.
        renderer: of the same model.
        revision: of a model on the hub.
        dtype: of the weights on a GPU; the CPU always computes in float32.
        max_model_len: tokens of prompt and answer together; None: as many as the model allows.
        max_images: images per prompt.
        gpu_memory_utilization: part of each GPU's memory that weights and key-value cache may take.
        tensor_parallel_size: GPUs the model is split over.
        cpu_cache_bytes: key-value cache where there is no GPU.
    """

    def __init__(
        self,
        path: str | Path,
        renderer: Renderer,
        *,
        revision: str | None = None,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        max_images: int = 1,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        cpu_cache_bytes: int = 1 << 30,
    ) -> None:
        environment, set_num_threads = dict(os.environ), torch.set_num_threads
        os.environ.update(_ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings repeat at every weight update
        from vllm import LLM  # takes half a minute, and must see the environment
        from vllm.platforms import current_platform

        self._on_cpu: bool = current_platform.is_cpu()
        on_cpu = {
            "dtype": "float32",
            "enforce_eager": True,  # compiling costs more than it gives on a CPU
            "enable_chunked_prefill": False,  # a seeded request split over two steps crashes vLLM's CPU sampler
            "skip_mm_profiling": True,
            "kv_cache_memory_bytes": cpu_cache_bytes,
        }
        on_gpu = {
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enable_sleep_mode": True,
        }
        self._renderer = renderer
        self._split = tensor_parallel_size > 1
        self._version = 0
        self._stale = False  # the weights are not those of any policy
        self._cacheless = False  # the key-value cache sleeps
        self._names = _checkpoint_names(path, revision)
        self._llm: LLM | None = LLM(
            model=str(path),
            revision=revision,
            load_format="safetensors",
            max_model_len=max_model_len,
            limit_mm_per_prompt={"image": max_images, "video": 0},
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # nothing but `Sampling` decides how answers are drawn
            **(on_cpu if self._on_cpu else on_gpu),
        )
        # vLLM changes settings of the whole process, which the learner may share: put them back, now or when it closes.
        torch.set_num_threads = set_num_threads
        self._environment = {
            name: environment.get(name) for name, value in os.environ.items() if environment.get(name) != value
        }

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of `sampling.num_samples` samples per prompt, in the order of `prompts`.

        Raises:
            ValueError: a prompt leaves too little room for the answer, vLLM read a prompt differently than the
                renderer, or the engine waits for weights.
        """
        if self._stale:
            raise ValueError("the engine has no complete weights; call load_weights before generate")
        from vllm import TokensPrompt

        rendered = [self._renderer.render(prompt) for prompt in prompts]
        room = self._engine.model_config.max_model_len - sampling.max_tokens
        for prompt, context in zip(prompts, rendered, strict=True):
            if len(context.token_ids) > room:
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(context.token_ids)} tokens, at most {room} leave room for "
                    f"{sampling.max_tokens} tokens of answer; raise max_model_len, lower max_tokens or max_pixels"
                )
        inputs = [
            TokensPrompt(
                prompt_token_ids=list(context.compact_ids),
                multi_modal_data={"image": self._renderer.pictures(prompt)} if prompt.images else None,
            )
            for prompt, context in zip(prompts, rendered, strict=True)
        ]
        params = [self._params(sampling, index) for index in range(len(prompts))]
        # On a CPU, compiling the one function vLLM compiles here takes longer than a demo.
        with torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext():
            try:
                outputs = self._engine.generate(inputs, params, use_tqdm=False)
            except BaseException:  # requests are left inside that would never finish, and the next call would wait
                self.close()
                raise
        for prompt, context, output in zip(prompts, rendered, outputs, strict=True):
            if tuple(output.prompt_token_ids) != context.token_ids:
                raise ValueError(
                    f"vLLM reads prompt {prompt.id!r} as {len(output.prompt_token_ids)} tokens, the renderer as "
                    f"{len(context.token_ids)}, and they differ; load engine and renderer from the same folder"
                )
        return [self._group(prompt, output, sampling) for prompt, output in zip(prompts, outputs, strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load `weights` in place, layer by layer, and forget everything computed from the old ones.

        Args:
            weights: under the names of the checkpoint the engine started from, in any order.

        Raises:
            ValueError: a weight of that checkpoint was not sent; the engine is then unusable.
        """
        received: set[str] = set()
        if self._split:  # other processes cannot share an iterator
            stream: Iterable[tuple[str, Tensor]] = [(name, weight.cpu()) for name, weight in _noting(weights, received)]
        else:
            stream = _noting(weights, received)
        self._stale = True
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        if missing := sorted(self._names - received):
            raise ValueError(
                f"{len(missing)} weights of the checkpoint were not sent, {missing[:_MAX_NAMED]} among them; send "
                "every weight under the name transformers saves it by"
            )
        # The workers forgot their image features; the scheduler and the front end still believe in them.
        self._engine.llm_engine.reset_encoder_cache()
        self._engine.llm_engine.reset_mm_cache()
        if self._cacheless:
            self._engine.wake_up(tags=["kv_cache"])
            self._cacheless = False
        self._engine.llm_engine.reset_prefix_cache()
        self._stale = False
        self._version = version

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """On a GPU, keep neither weights nor cache: the learner is about to send new weights. On the CPU, nothing."""
        if self._on_cpu:
            yield
            return
        self._engine.sleep(level=2)
        self._stale = self._cacheless = True
        try:
            yield
        finally:
            # The cache returns after the weights have arrived, so that both peaks do not add up.
            self._engine.wake_up(tags=["weights"])

    def close(self) -> None:
        """Shut vLLM down, its worker processes and process groups included."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    @property
    def _engine(self) -> LLM:
        if self._llm is None:
            raise ValueError("the engine is closed; build another")
        return self._llm

    def _params(self, sampling: Sampling, prompt_index: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.num_samples if sampling.temperature > 0 else 1,  # vLLM draws a certain answer only once
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=prompt_seed(sampling.seed, prompt_index),  # vLLM adds the sample's number
            stop_token_ids=sorted(self._renderer.stop_token_ids),
            logprobs=0,  # of the drawn token only
            logit_bias=dict.fromkeys(self._renderer.placeholder_token_ids, -math.inf),
            detokenize=False,
        )

    def _group(self, prompt: Prompt, output: RequestOutput, sampling: Sampling) -> Group:
        samples = tuple(
            self._renderer.sample(
                answer.token_ids,
                [step[token_id].logprob for step, token_id in zip(answer.logprobs, answer.token_ids, strict=True)],
                self._version,
            )
            for answer in output.outputs
        )
        return Group(
            prompt=prompt,
            prompt_ids=tuple(output.prompt_token_ids),
            samples=samples * (sampling.num_samples // len(samples)),
        )


def _noting(weights: Iterable[tuple[str, Tensor]], received: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Pass `weights` on, noting their names; copies, because vLLM holds them until their layer is complete."""
    for name, weight in weights:
        received.add(name)
        yield name, weight.detach().clone()


def _checkpoint_names(path: str | Path, revision: str | None) -> frozenset[str]:
    """Names of the weights in the safetensors files of a folder, or of a model on the hub."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns="*.safetensors"))
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    if not names:
        raise ValueError(f"{folder} holds no safetensors files; expected a model saved by transformers")
    return frozenset(names)
