"""From prompts to text: a continuation as it grows, batches of prompts, files of prompts."""
