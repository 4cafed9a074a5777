"""Any model handle -> a local directory that holds a model. No TensorFlow here."""

from __future__ import annotations

import os

from storage import files
from storage.errors import RequestError

SAVED_MODEL, HUB_V1 = "saved_model", "hub_v1"


def model_format(directory: str) -> str:
    """`hub_v1` or `saved_model`, by the files in `directory`. RequestError where it holds none."""
    if not os.path.isdir(directory):
        raise RequestError(
            f"--model {directory}: no such directory; give a folder with a saved_model.pb, such as "
            "`python -m pipeline.models export` writes"
        )
    if not os.path.isfile(os.path.join(directory, "saved_model.pb")):
        raise RequestError(
            f"--model {directory}: holds no saved_model.pb, so no model; give the folder itself "
            "that holds it"
        )
    return HUB_V1 if os.path.isfile(os.path.join(directory, "tfhub_module.pb")) else SAVED_MODEL


def resolve(handle: str) -> str:
    """The absolute path of the model that `handle` names. RequestError where there is none."""
    directory = files.absolute(handle)
    model_format(directory)
    return directory
