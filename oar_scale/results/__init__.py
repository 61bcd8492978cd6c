"""The vocabulary of figures and examples that evaluation and studies compute and reports show."""
