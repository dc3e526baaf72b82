"""Videos beside the results become videos beside the page."""

from ringrl.evaluation.records import append_records, read_records
from ringrl.study.report import write_report
from ringrl.study.report_cells import gather
from ringrl.study.report_videos import reels


def found(root):
    read = read_records([root])
    return reels(read, gather(read.records))


def test_of_each_cell_the_lowest_seed(make_study, tmp_path):
    root = make_study(tmp_path / "runs", video=b"film")
    shown = found(root)
    assert [(reel.method, reel.seed) for reel in shown] == [
        ("Agentic Transformer (1 trajectory)", 0), ("Agentic Transformer (2 trajectories)", 0),
    ]  # fmt: skip
    assert [video.label for video in shown[0].videos] == ["first", "median", "best"]
    assert shown[0].videos[0].target == "videos/cartpole_swingup.001eeeeeeeee.first.mp4"
    page = write_report([root], tmp_path / "report")
    assert (page.parent / shown[1].videos[2].target).read_bytes() == b"film"
    assert page.read_text().count("<video ") == 6


def test_an_empty_file_is_no_video(make_study, tmp_path):
    root = make_study(tmp_path / "runs", video=b"film")
    for file in root.glob("*_at_1_seed0/*.videos/*/*.mp4"):
        file.write_bytes(b"")
    assert [reel.seed for reel in found(root)] == [1, 0]


def test_a_name_does_not_lead_out_of_the_folder(make_rollouts, tmp_path):
    task = "../../outside"
    append_records(tmp_path / "in" / "results.jsonl", make_rollouts(1, 0, 1.0, task=task, evaluation="f" * 64))
    outside = tmp_path / "in" / "results.videos" / f"{task}.{'f' * 12}"
    (tmp_path / "in" / "results.videos").mkdir()
    outside.resolve().mkdir()
    (outside / "best.mp4").write_bytes(b"film")
    assert found(tmp_path / "in") == []


def test_without_videos_the_page_says_how_to_make_them(make_study, tmp_path):
    page = write_report([make_study(tmp_path / "runs")], tmp_path / "report")
    assert "ringrl evaluate --video" in page.read_text()
    assert not (page.parent / "videos").exists()
