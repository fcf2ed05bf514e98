"""What a comparison of models found: numbers, a recommendation, one page."""
