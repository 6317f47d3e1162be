"""What the pictures of a report say that they show."""

import pandas as pd

from brainsynth.report.figures import covariate_histograms

ROWS = pd.DataFrame({"age": [40.0, 60.0, 50.0], "sex": ["F", "M", "F"]})


def labels(reference: pd.DataFrame | None) -> list[list[str]]:
    figure = covariate_histograms(ROWS, reference, {"age": "years", "sex": ""})
    return [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]


def test_rows_stand_beside_the_training_cohort_where_it_is_known() -> None:
    assert labels(ROWS) == [["training cohort", "this dataset"]] * 2
    assert labels(None) == [["this dataset"]] * 2
