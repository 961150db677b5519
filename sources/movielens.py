"""MovieLens as published: ratings and titles, in the three ways in which its editions are written.

ml-100k                  u.data (tabs), u.item (bars, with a column for each genre)
ml-1m, ml-10m            ratings.dat, movies.dat (double colons)
ml-20m and later         ratings.csv, movies.csv, with headers

Every rating counts as an interaction, whatever its stars. Source:
https://grouplens.org/datasets/movielens
"""
from common.interactions import Interactions, has_own_table
from common.items import notes_of_match, order_of
from common.tables import CSV, Form, Raw, clean_text, each_row, sentences

GENRES = (    # the columns of u.item
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
RATINGS = ("user", "item", "rating", "time")
EDITIONS = (    # (ratings, how they are written, titles, how they are written)
    ("u.data", Form("\t", False, RATINGS),
     "u.item", Form("|", False, ("movieid", "title", "released", "video", "address", *GENRES))),
    ("ratings.dat", Form("::", False, RATINGS),
     "movies.dat", Form("::", False, ("movieid", "title", "genres"))),
    ("ratings.csv", CSV, "movies.csv", CSV),
)


def recognises(folder) -> bool:
    return edition_of(folder) is not None and not has_own_table(folder)


def read(folder, name) -> Raw:
    """Raises UserError for a missing column, a damaged file, or more than 1 % unusable lines."""
    ratings, written, titles, titles_written = edition_of(folder)
    report = {}
    interactions = Interactions()
    report[ratings] = interactions.read(folder / ratings, written)
    columns = interactions.columns(folder / ratings, report)
    catalog = {}

    def take(movie, title, genres, *flags):
        movie = movie.strip()
        if not movie:
            return "no_movie"
        kinds = [genre for genre, flag in zip(GENRES, flags) if flag == "1" and genre != "unknown"]
        if genres.strip() != "(no genres listed)":
            kinds += filter(None, genres.split("|"))
        catalog.setdefault(movie, {
            "title": clean_text(title),
            "text": sentences(", ".join(kinds)),
            "language": "en",
            "images": [],
        })

    optional = ("genres", *map(str.lower, GENRES))
    report[titles] = each_row(
        folder / titles, ("movieid", "title"), take, optional, titles_written
    )
    rated = columns["items"].names
    columns["notes"] += notes_of_match(catalog, rated, titles, ratings)
    order = order_of(catalog, rated)
    return Raw(catalog=catalog, report=report, item_order=order, **columns)


def edition_of(folder):
    """The row of EDITIONS whose two files are in a folder; None where none is."""
    for edition in EDITIONS:
        ratings, _, titles, _ = edition
        if (folder / ratings).is_file() and (folder / titles).is_file():
            return edition
    return None
