/* Doubly linked rings, the links inside what they link. */
#ifndef SIMULATOR_HOST_LIST_H
#define SIMULATOR_HOST_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list {
    struct list *next, *prev;
};

#define LIST_OF(link, type, member) ((type *)(void *)((char *)(link) - offsetof(type, member)))
/* The entry in hand may be removed; another one may not. */
#define LIST_EACH(link, after, head)                                                             \
    for (struct list *link = (head)->next, *after = link->next; link != (head);                  \
         link = after, after = link->next)

static inline void list_init(struct list *list)
{
    list->next = list->prev = list;
}

static inline bool list_empty(const struct list *list)
{
    return list->next == list;
}

static inline void list_insert_before(struct list *link, struct list *place)
{
    link->prev = place->prev;
    link->next = place;
    place->prev->next = link;
    place->prev = link;
}

static inline void list_append(struct list *head, struct list *link)
{
    list_insert_before(link, head);
}

static inline void list_prepend(struct list *head, struct list *link)
{
    list_insert_before(link, head->next);
}

/* Removing what is in no list does nothing, as long as it was initialised. */
static inline void list_remove(struct list *link)
{
    link->prev->next = link->next;
    link->next->prev = link->prev;
    list_init(link);
}

#endif
