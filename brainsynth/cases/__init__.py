"""Cases: one noise under many covariates, and cohorts by their description.

A case becomes an ordinary covariate table: `generate` takes it and knows nothing of cases.
"""
