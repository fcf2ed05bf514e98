"""Results of a comparison of models: numbers, a recommendation, one page."""
