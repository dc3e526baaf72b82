"""The Minari library, which is an extra, and where it keeps datasets."""

import importlib
from pathlib import Path
from types import ModuleType

from ringrl.errors import UserError

METADATA = "metadata.json"
EPISODES = "main_data.hdf5"
INFOS = {"reward": "recorded_reward", "discount": "recorded_discount", "physics": "physics"}  # of an export
EXPORTED = "ringrl"  # the key of the metadata under which an export says where it comes from


def minari_module(name: str = "minari") -> ModuleType:
    """A module of the library; UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"Minari cannot be used ({error}): pip install 'ringrl[minari]'") from error


def check_id(name: str) -> None:
    """UserError unless Minari takes the name for that of a dataset, such as exorl/walker-rnd-v0."""
    parse = minari_module("minari.dataset.minari_dataset").parse_dataset_id
    try:
        parse(name)
    except (ValueError, TypeError) as error:  # TypeError: the version is missing
        raise UserError(f"{name}: is no name of a Minari dataset, which look like exorl/walker-rnd-v0") from error
    if not name.isascii():
        raise UserError(f"{name}: use letters, digits, - and _ in the name of a dataset")


def datasets_folder() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, or a folder of the user's."""
    folder: Path = minari_module("minari.storage").get_dataset_path()
    return folder


def locate(dataset: str, *, download: bool) -> Path:
    """The folder with the data of a dataset, given its own folder or its name.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    for folder in (Path(dataset), Path(dataset) / "data"):
        if (folder / METADATA).is_file():
            return folder
    if Path(dataset).is_dir():
        raise UserError(f"{dataset}: is no Minari dataset, {METADATA} is missing: give the folder of one")
    check_id(dataset)
    folder = datasets_folder() / dataset / "data"
    if not folder.is_dir() and download:
        try:
            minari_module().download_dataset(dataset)
        except ImportError as error:
            raise UserError(f"{dataset}: Minari cannot download ({error}): pip install 'ringrl[minari]'") from error
        except Exception as error:  # whatever the network, its libraries or the server raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{dataset}: Minari could not download it ({reason}): try again later") from error
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{dataset}: neither a folder nor a dataset in {datasets_folder()}: check the name (minari list local), or "
            "let Minari fetch it (--download)"
        )
    return folder
