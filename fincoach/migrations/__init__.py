"""The history of the tables: one file a change in `versions/`, applied by `fincoach.data.database.upgrade`."""
