"""The accuracy gate of an export: measure, find what is sensitive, restore as little as will do."""
