"""What an API speaks: a request in its words, its refusals, its errors. Each dialect is a spoke, the hub is chat.py."""
