"""From a checkpoint to a Hugging Face folder, verified; the published format in and out."""
