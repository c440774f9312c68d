"""The benchmarks of MindSpeed-LLM's evaluate scripts: its names and file layouts, as tasks of lm-evaluation-harness."""
