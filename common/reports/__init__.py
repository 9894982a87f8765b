"""Everything drawn for people: pictures of CTs and of encoders, and the page of one CT."""
