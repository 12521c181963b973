"""Stage `report`: one self-contained HTML page on the data: what was kept and dropped, why, and how it looks."""
