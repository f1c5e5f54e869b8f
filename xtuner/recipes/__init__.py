"""Built-in configurations, runnable by name: `python -m xtuner.run train quickstart`."""
