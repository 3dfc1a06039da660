"""A model behind OpenAI's API, with a page to talk to it."""
