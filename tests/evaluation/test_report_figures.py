"""What the pictures of a report say that they show."""

import warnings

import pandas as pd

from brainsynth.report.figures import covariate_histograms

ROWS = pd.DataFrame({"age": [40.0, 60.0, 50.0], "sex": ["F", "M", "F"]})


def labels(reference: pd.DataFrame | None) -> list[list[str]]:
    figure = covariate_histograms(ROWS, reference, {"age": "years", "sex": ""})
    return [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]


def test_rows_stand_beside_the_training_cohort_where_it_is_known() -> None:
    assert labels(ROWS) == [["training cohort", "this dataset"]] * 2
    assert labels(None) == [["this dataset"]] * 2


def test_a_covariate_that_nobody_has_leaves_its_panel_empty() -> None:
    gone = ROWS.assign(age=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = covariate_histograms(gone, gone, {"age": "years", "sex": ""})
    assert figure.axes[0].get_legend() is None
    assert figure.axes[1].get_legend() is not None
