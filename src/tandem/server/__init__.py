"""Models behind OpenAI's protocol, and a page to chat with them."""
