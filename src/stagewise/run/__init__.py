"""From a configuration to a report: settings, the engine that computes cells, the pipeline through the rooms."""
