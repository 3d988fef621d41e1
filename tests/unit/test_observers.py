import io
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mnist_dist.observe.console import TrainingConsole
from mnist_dist.observe.figures import RIGHT, WRONG, Sample, sample_grid
from mnist_dist.observe.lettering import drawable, letters, wrap
from mnist_dist.observe.records import EpochReport, Evaluation, Plan, Result, StepReport
from mnist_dist.observe.terminal import print_samples

PLAN = Plan(
    run="runs/a-name-that-is-rather-long-20260101-120000", device="cpu", device_reason="no GPU found",
    precision="fp32", precision_reason="the safe choice on cpu", ranks=2, threads=1, threads_reason="as asked",
    global_batch=64, micro_batch=16, accumulation=2, reduction="ddp", first_step=0, total_steps=100, epochs=2,
    model="small_cnn", parameters=21840,
    optimizer="sgd, learning rate 0.03", schedule="cosine", augmentation="none", data="Dataset",
    classes=tuple("0123456789"), train_images=3200, validation_images=320, test_images=700,
    store="decoded earlier, Dataset/.mnist-dist/x",
)  # fmt: skip
EPOCH = EpochReport(
    epoch=1, step=50, images=3200, train_loss=0.5, train_accuracy=0.9, test_images=700, test_loss=0.25,
    test_accuracy=0.9512, validation_loss=0.3, validation_accuracy=0.94, images_per_second=12345.6, seconds=1.5,
    learning_rate=0.03,
)  # fmt: skip
RESULT = Result(
    status="finished", run=PLAN.run, step=100, epochs=2, seconds=9.5, evaluated="700/700", metrics=EPOCH.metrics()
)
NOBODY = Evaluation(split="test", labels=np.zeros(1, int), predicted=np.zeros(1, int), losses=np.zeros(1, np.float32))


@pytest.mark.parametrize(("device", "shown"), [("cuda", "; TF32 off"), ("cpu", "")])
def test_the_plan_says_on_a_gpu_that_tf32_is_off(device, shown):
    console = Console(file=io.StringIO(), width=120)
    observer = TrainingConsole(console)
    observer.plan(replace(PLAN, device=device, precision_reason="as asked"))
    (line,) = (line for line in console.file.getvalue().splitlines() if "precision" in line)
    assert line.rstrip(" │").endswith(f"fp32 (as asked){shown}")


def watch(console):
    observer = TrainingConsole(console)
    observer.plan(PLAN)
    observer.progress(10)
    observer.step(StepReport(step=50, epoch=1, loss=0.5, accuracy=0.9, learning_rate=0.03, images_per_second=12345.6))
    observer.epoch(EPOCH, NOBODY)
    observer.result(RESULT)
    observer.close()
    return console.file.getvalue()


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, legacy_windows=False)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_is_wider_than_the_terminal(width):
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watch(terminal(width)))
    assert max(map(len, re.split(r"[\r\n]", output))) <= width
    assert "95.12%" in output


def test_a_resumed_run_shows_the_epoch_that_it_is_in():
    console = terminal(120)
    observer = TrainingConsole(console)
    observer.plan(replace(PLAN, first_step=50))
    observer.close()
    assert "epoch 2/2" in console.file.getvalue()


def test_a_wide_terminal_has_every_column_and_a_narrow_one_the_chief_ones():
    titles = ["epoch", "train loss", "val. acc.", "test loss", "test acc."]
    wide, narrow = watch(terminal(160)), watch(terminal(80))
    assert all(title in wide and title in narrow for title in titles)
    assert "learn. rate" in wide
    assert "learn. rate" not in narrow


def test_without_a_terminal_there_are_plain_lines_alone():
    output = watch(Console(file=io.StringIO(), width=80))
    assert "\x1b" not in output
    assert "\r" not in output
    assert "global batch: 64 = 16 x 2 x 2" in output
    assert re.search(r"^epoch 1/2  step 50  train loss 0.5000 .*test loss 0.2500 accuracy 95.12%.*$", output, re.M)
    assert "evaluated 700/700" in output
    assert output.count("next:") == 3


HOSTILE = ["\x1b[31mred", "[red]x", ":dog:", "a|b", "two\nlines", "\udce9t\udce9", "<img src=http://x/y.png>",
           "![x](http://x/y.png)", "\u202egnp", "```", "Łódź", "東京"]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("on_terminal", [True, False])
def test_names_are_text_in_every_line_of_a_run(encoding, on_terminal):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = Console(file=stream, force_terminal=on_terminal, width=300, legacy_windows=False)
    observer = TrainingConsole(console)
    observer.plan(replace(PLAN, classes=tuple(HOSTILE), run="runs/a\nb [red] \x1b]0;title\x07", data="my :dog: data"))
    observer.epoch(EPOCH, NOBODY)
    observer.result(replace(RESULT, run="runs/a\nb [red] \x1b]0;title\x07"))
    stream.flush()
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.buffer.getvalue().decode(encoding))
    assert not set("\x1b\x07\u202e") & set(output)
    for text in (
        r"\x1b[31mred, [red]x, :dog:, a|b, two\nlines, \udce9t\udce9, <img",
        r"runs/a\nb [red] \x1b]0;title\x07",
    ):
        assert text in output
    assert "my :dog: data" in output


def test_a_callers_own_console_reads_no_markup_in_names():
    console = Console(file=io.StringIO(), width=80)
    TrainingConsole(console).plan(replace(PLAN, classes=("[/y]", "[bold]b")))
    assert "[/y], [bold]b" in console.file.getvalue()


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer")
def test_tensorboards_pages_show_names_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugin_util import markdown_to_safe_html

    from mnist_dist.config import load
    from mnist_dist.config.resolve import Setting
    from mnist_dist.data import open_dataset
    from mnist_dist.observe.tensorboard import TensorBoard

    data = "\n```\n" + "".join(HOSTILE).replace("\udce9", "")
    resolved = load("quick")
    config = load("quick", (Setting(key="data.root", value=data, origin="--data"),))
    dataset = open_dataset(resolved.config.data, seed=0, announce=print)
    page = TensorBoard(tmp_path, config=config.config, config_yaml=config.to_yaml(), dataset=dataset)
    page.plan(replace(PLAN, classes=tuple(HOSTILE), data=data))
    page.close()
    texts = [
        value.tensor.string_val[0].decode()
        for event in EventFileLoader(str(next(tmp_path.iterdir()))).Load()
        for value in event.summary.value
        if value.tag.endswith("/text_summary")
    ]
    pages = [markdown_to_safe_html(text) for text in texts]
    assert len(pages) == 2
    assert not any(tag in page for page in pages for tag in ("<img", "<a", "\x1b", "\u202e"))
    cells = re.findall("<td>(.*?)</td>", pages[1])
    assert len(cells) == 2 * len(re.findall("<tr>", pages[1])) - 2  # but for the heading, each row has two
    assert pages[0].count("<pre>") == 1
    assert pages[0].endswith("</code></pre>")


@pytest.mark.parametrize(
    "text", ["é ß ł ąęśćźż çñøåæœ ğışİ țș Đđ", "Ελλάδα", "Москва ёїў", "Việt Nam", "€ “”", "e\u0301"]
)
def test_accented_greek_and_cyrillic_names_are_drawn(text):
    assert drawable(text) == unicodedata.normalize("NFC", text)


def test_what_the_font_lacks_is_escaped_and_not_boxed():
    assert drawable("東京 \x1b \udce9 a") == r"\u6771\u4eac \x1b \udce9 a"


def test_a_long_name_is_whole_above_its_picture():
    name = "Tomato___Tomato_Yellow_Leaf_Curl_Virus_and_some_more_letters"
    lines = wrap(f"predicted {name}", 112)
    assert "".join(lines).replace(" ", "") == f"predicted{name}"
    assert max(map(letters().getlength, (line.rstrip() for line in lines))) <= 112
    assert sample_grid([sample(name, name)]).height > sample_grid([sample("1", "1")]).height


def sample(predicted, true):
    return Sample(pixels=np.full((1, 28, 28), 200, np.uint8), predicted=predicted, true=true)


def colours(picture):
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in picture.getcolors(1 << 24)}


def test_wrong_predictions_alone_are_marked():
    right, wrong = sample_grid([sample("1", "1")]), sample_grid([sample("7", "1")])
    assert RIGHT in colours(right)
    assert WRONG not in colours(right)
    assert WRONG in colours(wrong)


def test_a_grid_has_a_place_for_each_picture():
    one, nine = sample_grid([sample("1", "1")]), sample_grid([sample("1", "1")] * 9)
    assert nine.width > 7 * one.width
    assert nine.height > 1.8 * one.height


def test_a_plan_says_what_is_done_of_an_epoch():
    plan = replace(PLAN, epochs=15, total_steps=20)
    assert (plan.planned_epochs, plan.last_epoch) == (0.4, 1)
    assert (PLAN.planned_epochs, PLAN.last_epoch) == (2, 2)


@pytest.mark.parametrize("colour", [True, False])
def test_pictures_are_drawn_in_any_terminal(colour):
    console = Console(file=io.StringIO(), force_terminal=colour, color_system="truecolor" if colour else None, width=80)
    print_samples(console, [sample("7", "1"), sample("2", "2")])
    output = console.file.getvalue()
    assert "7  (true 1)" in output
    assert ("▀" in output) is colour


@pytest.mark.parametrize("width", [16, 17, 33, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_pictures_are_drawn_at_any_width_and_in_any_encoding(width, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # strict: nothing may be lacking
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=width)
    print_samples(console, [sample("[red]" * 9, "1"), sample("é\x1b東", "é\x1b東"), sample("2", "2")])
    stream.flush()
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.buffer.getvalue().decode(encoding))
    assert "\x1b" not in output
    assert ("✓" in output, "(right)" in output) == (
        (True, False) if encoding == "utf-8" else (False, True)
    ) or width < 16
