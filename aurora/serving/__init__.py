"""Aurora as a service: the web page, and an API that clients of OpenAI's chat completions speak."""
