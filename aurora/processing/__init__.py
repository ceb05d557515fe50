"""From files to tensors and from ids to text: images, videos, tokenizers, prompts."""
