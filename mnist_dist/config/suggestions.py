"""Suggest our word for an unknown one: synonyms from other tools first, then spelling. If neither fits, nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mnist_dist.config.schema import Augmentation

CLOSE = 0.75
"""How alike two words must be, as difflib counts, to be taken for a slip of the fingers."""
CLOSE_OF_FEW = 0.6
"""The same where there are only a few words to choose from."""

_LOADER = "Images are decoded once, so there are no loader workers to set"
_PROCESSES = "The number of processes belongs to the command, not to the config: use --processes"
_RUN = "Where a run is written belongs to the command, not to the config: use --run"
_RESUME = "`mnist-dist resume RUN` continues a run, and --init-from RUN starts from its weights"
_WEIGHTS = "A network starts from random weights; --init-from RUN starts from those of another run"
_STOPPING = "There is no early stopping: the best checkpoint is kept where there are validation images"
_ORDER = "Every epoch is shuffled from train.seed, and no batch is short"
_ACCUMULATION = "The global batch is divided into micro-batches: set train.micro_batch"
_AUGMENT = f"Augmentation has data.augment.{', '.join(Augmentation.model_fields)}"
_WATCH = "Every run writes metrics.jsonl and TensorBoard's files, and `mnist-dist monitor` shows them"
_CLASSES = "The classes are the folders below train"
_BACKEND = "The device decides on the backend: see train.device"

_INSTEAD = {
    _LOADER: "workers num_workers nworkers n_workers num_worker loader_workers dataloader_workers "
    "dataloader_num_workers workers_per_gpu prefetch prefetch_factor pin_memory persistent_workers",
    _PROCESSES: "processes num_processes nprocs nproc np gpus num_gpus ngpus n_gpus n_gpu gpu_ids nproc_per_node "
    "devices num_devices world_size nodes num_nodes nnodes ranks",
    _RUN: "run run_dir output_dir out_dir outdir output save_dir log_dir logdir work_dir workdir exp_name experiment "
    "experiment_name run_name project default_root_dir name",
    _RESUME: "resume resume_from resume_from_checkpoint ckpt ckpt_path checkpoint_path load_from continue",
    _WEIGHTS: "pretrained weights pretrained_weights finetune init_from freeze freeze_backbone",
    _STOPPING: "patience early_stop early_stopping early_stopping_patience",
    _ORDER: "shuffle drop_last drop_remainder sampler",
    _ACCUMULATION: "accumulate_grad_batches gradient_accumulation_steps gradient_accumulation grad_accum accumulation "
    "grad_accum_steps accum_steps accumulation_steps",
    _AUGMENT: "augment augmentation augmentations transform transforms mixup cutmix color_jitter "
    "random_crop randaugment auto_augment aa",
    _WATCH: "tensorboard wandb logger trackers report_to use_wandb tracker",
    _CLASSES: "num_classes nb_classes n_classes classes class_names",
    _BACKEND: "backend dist_backend ddp_backend strategy",
    "The loss is cross-entropy; train.label_smoothing is its only setting": "loss loss_fn criterion",
    "There is no averaging of weights": "ema ema_decay model_ema use_ema swa",
    "The files below test are the test set; data.validation_fraction holds out training images": "test_size test_split",
}
"""A sentence, by the words of other tools for what is done in another way here."""

_KEYS = {
    "optimizer.learning_rate": "lr learningrate base_lr lr0 max_lr peak_lr init_lr initial_lr eta",
    "train.global_batch": "batch_size batchsize batch bs bsz total_batch_size train_batch_size global_batch_size",
    "train.micro_batch": "per_device_batch_size per_device_train_batch_size micro_batch_size microbatch device_batch "
    "device_batch_size per_gpu_batch_size per_gpu_train_batch_size batch_size_per_gpu batch_size_per_device "
    "samples_per_gpu",
    "train.epochs": "num_epochs max_epochs n_epochs epoch nepochs num_train_epochs epochs_num",
    "train.max_steps": "steps num_steps total_steps max_iters max_iter iterations iters num_iterations",
    "data.root": "path dir folder directory dataset data_dir data_path data_root dataset_path dataset_dir root_dir "
    "datadir train_dir image_folder",
    "data.image_size": "size img_size imgsz image_sz resolution input_size resize crop_size image_width image_height",
    "data.channels": "in_channels num_channels in_chans grayscale colour color",
    "data.validation_fraction": "val_split validation_split val_fraction val_size valid_pct val_pct validation_size "
    "valid_fraction split",
    "data.max_megapixels": "max_pixels max_image_pixels",
    "data.mean": "normalize normalise normalization img_mean image_mean",
    "data.std": "img_std image_std",
    "data.augment.rotation_degrees": "rotation rotate degrees random_rotation",
    "data.augment.shift_pixels": "shift translate translation",
    "data.augment.scale": "zoom scale_range",
    "data.augment.horizontal_flip": "flip hflip horizontal_flip random_horizontal_flip fliplr",
    "data.augment.vertical_flip": "vflip random_vertical_flip flipud",
    "data.augment.erase": "random_erasing reprob erasing cutout",
    "model.name": "model arch architecture network backbone net model_name model_type",
    "model.dropout": "drop drop_rate dropout_rate dropout_p p_drop",
    "optimizer.name": "opt optim optimizer_name optimiser optimizer_type",
    "optimizer.weight_decay": "wd decay l2 weightdecay",
    "optimizer.beta1": "betas adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "schedule.name": "scheduler lr_scheduler lr_schedule sched lr_scheduler_type",
    "schedule.warmup_fraction": "warmup warmup_steps warmup_epochs warmup_ratio pct_start lr_warmup_epochs",
    "schedule.every_epochs": "step_size lr_step_size milestones decay_epochs lr_steps",
    "schedule.factor": "gamma lr_gamma decay_rate lr_decay",
    "schedule.final_fraction": "min_lr eta_min final_lr lrf lr_min end_lr",
    "train.threads": "num_threads omp_num_threads n_threads nthreads cpu_threads",
    "train.seed": "random_seed manual_seed random_state rng_seed",
    "train.precision": "amp use_amp mixed_precision fp16 bf16 fp32 half dtype native_amp",
    "train.device": "gpu cuda cpu accelerator use_cuda no_cuda use_cpu use_gpu",
    "train.reduction": "exact ddp deterministic",
    "train.clip_norm": "grad_clip clip_grad max_grad_norm gradient_clip_val gradient_clip clip max_norm "
    "clip_grad_norm gradient_clipping",
    "train.label_smoothing": "smoothing label_smooth",
    "train.log_every": "log_interval log_freq logging_steps print_freq log_every_n_steps logging_interval",
    "train.compile": "torch_compile compiled torchcompile",
    "train.graph": "cuda_graph cuda_graphs cudagraph cudagraphs use_cuda_graph",
    "checkpoint.every_steps": "save_every save_steps save_freq save_interval checkpoint_every every_n_train_steps "
    "save_every_n_steps checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_last max_keep save_top_k num_to_keep keep_checkpoints max_to_keep",
}
"""The words of other tools, by the key that they mean."""

_OPTIONS = {
    "--data": "data_dir data_path dataset data_root dataset_path dataset_dir datadir train_dir image_folder folder dir "
    "path root input source",
    "--run": "output_dir out_dir outdir out output save_dir log_dir logdir work_dir workdir exp_name experiment name "
    "experiment_name run_name project default_root_dir model_dir ckpt_dir checkpoint_dir",
    "--processes": "gpus num_gpus ngpus n_gpus n_gpu nproc nprocs np num_processes nproc_per_node world_size devices "
    "num_devices ranks procs",
    "--device": "gpu cuda cpu accelerator use_cuda no_cuda use_cpu use_gpu",
    "--precision": "amp use_amp mixed_precision fp16 bf16 fp32 half dtype native_amp",
    "--epochs": "num_epochs max_epochs n_epochs epoch nepochs num_train_epochs",
    "--seed": "random_seed manual_seed random_state rng_seed",
    "--model": "arch architecture network backbone net model_name",
    "--batch-size": "batch batchsize bs bsz total_batch_size train_batch_size global_batch global_batch_size",
    "--lr": "learning_rate learningrate base_lr lr0 max_lr peak_lr init_lr initial_lr",
    "--config": "cfg conf config_file preset recipe yaml source",
    "--image": "images input file files picture pictures img path",
    "--init-from": "pretrained weights pretrained_weights finetune load_from init init_weights",
    "--resume": "continue resume_from resume_from_checkpoint",
    "--checkpoint": "ckpt ckpt_path checkpoint_path weights epoch step",
    "--json": "as_json format",
    "--output": "out save file output_file",
    "--split": "subset set partition",
    "--count": "n num number limit samples num_samples",
    "--steps": "num_steps max_steps iterations iters",
    "--seconds": "time duration secs",
    "--set": "override overrides option opts cfg_options",
    "--max-restarts": "restarts retries max_retries",
    "--nodes": "nnodes num_nodes num_machines machines",
    "--gpus-per-node": "gpus num_gpus gpus_per_machine",
    "--processes-per-node": "nproc_per_node gpus num_processes processes ntasks_per_node",
    "--head": "master_addr main_process_ip rdzv_endpoint master",
    "--node-rank": "machine_rank",
}
"""The words of other tools, by the option that they mean where a command has it."""

_COMMANDS = {
    "evaluate": "eval test val validate score benchmark_accuracy",
    "predict": "infer inference classify label run",
    "train": "fit start finetune training",
    "resume": "continue restart",
    "monitor": "tensorboard board watch dashboard logs ui",
    "bench": "benchmark profile speed perf",
    "doctor": "check diagnose env info system",
    "config": "configs presets",
    "data": "dataset datasets download import prepare",
    "launch": "distributed torchrun accelerate slurm kubernetes submit",
    "show": "view display visualize visualise samples",
}

_VALUES = {
    "cuda": "gpu nvidia",
    "mps": "metal apple",
    "fp16": "float16 half 16 16_mixed",
    "bf16": "bfloat16 bf16_mixed",
    "fp32": "float32 float full 32 32_true no",
    "one_cycle": "onecycle onecyclelr 1cycle",
    "cosine": "cosineannealing cosineannealinglr cos",
    "step": "steplr multistep",
    "exact": "deterministic",
    "ddp": "mean distributed",
}


def _index(words: dict[str, str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for meant, synonyms in words.items():
        for synonym in synonyms.split():
            index.setdefault(synonym, []).append(meant)
    return index


def plain(word: str) -> str:
    """Write a word as the tables here do: lower case, no dashes in front, underscores inside."""
    return word.strip().lstrip("-").lower().replace("-", "_")


def suggest_key(key: str, keys: list[str]) -> str:
    """Suggest what to write in place of a config key that does not exist.

    Args:
        key: Dotted, as the user wrote it.
        keys: All there are.

    Returns:
        A sentence that begins with a space, or nothing.
    """
    meant = keys_meant(key, keys)
    if meant:
        return f" Did you mean {any_of([repr(ours) for ours in meant])}?"
    instead = _index(_INSTEAD).get(plain(key.rpartition(".")[2]))
    if instead:
        return f" {instead[0]}."
    return _question(_alike_key(key, keys))


def keys_meant(key: str, keys: list[str]) -> list[str]:
    """List the keys whose own name or synonym a key ends with, those of its own section first and alone."""
    section, _, name = key.rpartition(".")
    name = plain(name)
    same = [ours for ours in keys if ours.rpartition(".")[2] == name]
    meant = same or [ours for ours in _index(_KEYS).get(name, []) if ours in keys]
    if not section and len(meant) > 1 and name in _index(_INSTEAD):
        return []  # a bare `name` is that of the run
    return [ours for ours in meant if section and ours.startswith(f"{section}.")] or meant


def suggest_option(option: str, options: list[str], keys: list[str]) -> str:
    """Suggest what to write in place of an option that a command does not have.

    Args:
        option: As the user wrote it, with its dashes.
        options: All that the command has.
        keys: All config keys.

    Returns:
        A sentence that begins with a space, or nothing.
    """
    name, names = plain(option), {plain(ours): ours for ours in options}
    if name in names:  # --batch_size, --LR
        return f" Did you mean {names[name]}?"
    meant = [ours for ours in _index(_OPTIONS).get(name, []) if ours in options]
    if meant:
        return f" Did you mean {meant[0]}?"
    takes_keys = "--set" in options
    if "batch" in name and "per" in name and takes_keys:
        batch = "--batch-size" if "--batch-size" in options else "train.global_batch"
        return (
            f" {batch} is the batch of all processes together, and they share it; "
            f"--set train.micro_batch=N is what one takes at a time."
        )
    if takes_keys and (found := keys_meant(name, keys)):
        return f" Did you mean {any_of([f'--set {key}=VALUE' for key in found])}?"
    instead = _index(_INSTEAD).get(name)
    if instead and (takes_keys or instead == [_LOADER]):
        return f" {instead[0]}."
    if "batch" in name and not takes_keys:
        return " This command chooses its own batches; they change no result."
    close = difflib.get_close_matches(name, names, n=1, cutoff=CLOSE)
    return f" Did you mean {names[close[0]]}?" if close else ""


def options_meant(option: str) -> set[str]:
    """Return what an option may be called here, without dashes: its own name, and those that it is a synonym of."""
    name = plain(option)
    return {name, *(plain(ours) for ours in _index(_OPTIONS).get(name, []))}


def suggest_command(word: str, commands: list[str]) -> str:
    """Suggest a command in place of one that does not exist; a sentence that begins with a space, or nothing."""
    meant = [ours for ours in _index(_COMMANDS).get(plain(word), []) if ours in commands]
    return _question(meant[0]) if meant else did_you_mean(word, commands)


def suggest_value(value: object, choices: Iterable[str]) -> str:
    """Suggest one of the choices in place of a value; a sentence that begins with a space, or nothing."""
    choices, word = list(choices), plain(str(value))
    meant = [ours for ours in _index(_VALUES).get(word, []) if ours in choices]
    return _question(meant[0]) if meant else did_you_mean(word, choices)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Phrase the choice that is spelled most like a word as a question, or nothing where none is."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=CLOSE_OF_FEW)
    return _question(close[0] if close else None)


def any_of(words: list[str]) -> str:
    """Phrase words as alternatives: "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _alike_key(key: str, keys: list[str]) -> str | None:
    """Return the key whose last word is spelled most like this one's: of the same section, or of any other."""
    section, _, name = key.rpartition(".")
    for pool in ([ours for ours in keys if section and ours.startswith(f"{section}.")], keys):
        names = {ours.rpartition(".")[2]: ours for ours in pool}
        close = difflib.get_close_matches(plain(name), names, n=1, cutoff=CLOSE)
        if close:
            return names[close[0]]
    return None


def _question(word: str | None) -> str:
    return f" Did you mean {word!r}?" if word else ""
