"""An OpenAI-compatible server: token engine, text, HTTP API, and the Ray Serve application that joins them."""
