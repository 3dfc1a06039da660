// A token's id is its title; where nothing can be pointed with, a tap shows it.
document.addEventListener("click", (event) => {
  if (event.target.title) document.title = `${event.target.textContent}: ${event.target.title}`;
});
