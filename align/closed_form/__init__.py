"""Maps that are solved for, their baselines, and the same fits as scikit-learn estimators."""
