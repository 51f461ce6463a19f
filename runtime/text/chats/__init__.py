"""Chats as the texts that models were trained to answer, by their templates."""
