"""Tasks that score a model: lm-eval's, CORE, and HellaSwag as llm.c prints it."""
